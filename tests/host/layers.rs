//! The house keeps its order: a folder of `src` imports only folders that stand above it, and no files import each other in a
//! circle. See docs/architecture.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use sink_attention::plan::Kernel;

/// The folders, each above those that may import it. Files of `src` itself stand below all of them.
const FOLDERS: [&str; 10] =
    ["problem", "cpu", "file", "device", "kernel", "plan", "exec", "attention", "cache", "testing"];

/// By the path below `src`, without unit tests in files of their own.
fn sources() -> BTreeMap<String, String> {
    fn visit(folder: &Path, found: &mut BTreeMap<String, String>) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
            if path.is_dir() {
                visit(&path, found);
            } else if name.ends_with(".rs") && name != "lib.rs" && !name.ends_with("/tests.rs") {
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found
}

/// Code without comments and unit tests; of a `mod.rs` also without `pub use`, which hands on what stands in its folder.
fn code(file: &str, text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let text: String =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).flat_map(|l| [l, "\n"]).collect();
    if !file.ends_with("mod.rs") {
        return text;
    }
    let mut left = String::new();
    let mut rest = text.as_str();
    while let Some(at) = ["pub use ", "pub(crate) use "].iter().filter_map(|mark| rest.find(mark)).min() {
        left.push_str(&rest[..at]);
        rest = rest[at..].split_once(';').unwrap().1;
    }
    left + rest
}

/// The module of a file, as a path below the crate.
fn module(file: &str) -> Vec<&str> {
    let path = file.trim_end_matches(".rs");
    path.strip_suffix("/mod").unwrap_or(path).split('/').collect()
}

/// The files that a file imports, wherever in its code it names them.
fn imports(file: &str, text: &str, files: &BTreeMap<String, String>) -> BTreeSet<String> {
    let by_module: BTreeMap<Vec<&str>, &str> = files.keys().map(|file| (module(file), file.as_str())).collect();
    let own = module(file);
    let code = code(file, text);
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = BTreeSet::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(start) {
            if code[..at].ends_with(|c| is_word(c) || c == ':') {
                continue;
            }
            let path: String = code[at..].chars().take_while(|&c| is_word(c) || c == ':').collect();
            let mut full: Vec<&str> = if start == "crate::" { Vec::new() } else { own.clone() };
            for word in path.split("::").filter(|word| !word.is_empty()) {
                match word {
                    "crate" | "self" => {}
                    "super" => drop(full.pop()),
                    word => full.push(word),
                }
            }
            // `use super::{a::x, b::y}` names several modules at once.
            let groups: Vec<Vec<&str>> = match code[at + path.len()..].strip_prefix('{') {
                Some(list) => {
                    let items =
                        list[..list.find('}').unwrap_or(list.len())].split(',').filter(|item| !item.trim().is_empty());
                    items.map(|item| [full.clone(), item.trim().split("::").collect()].concat()).collect()
                }
                None => vec![full],
            };
            for path in groups {
                let file_of = (1..=path.len()).rev().find_map(|n| by_module.get(&path[..n]));
                found.extend(file_of.filter(|found| **found != file).map(ToString::to_string));
            }
        }
    }
    found
}

fn folder(file: &str) -> Option<usize> {
    let (top, _) = file.split_once('/')?;
    Some(
        FOLDERS
            .iter()
            .position(|folder| *folder == top)
            .unwrap_or_else(|| panic!("{top} has no place among the folders")),
    )
}

/// Imports of folders that stand below, and of files of `src` itself.
fn upward(files: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let all = files
        .iter()
        .flat_map(|(file, text)| imports(file, text, files).into_iter().map(move |imported| (file.clone(), imported)));
    all.filter(|(file, imported)| match (folder(file), folder(imported)) {
        (Some(own), Some(imported)) => imported > own,
        (Some(_), None) => true,
        (None, _) => false,
    })
    .collect()
}

/// Files that reach themselves through imports.
fn in_circles(files: &BTreeMap<String, String>) -> Vec<String> {
    let edges: BTreeMap<&str, BTreeSet<String>> =
        files.iter().map(|(file, text)| (file.as_str(), imports(file, text, files))).collect();
    let reaches_itself = |start: &&str| {
        let mut reached = BTreeSet::new();
        let mut open: Vec<&str> = vec![start];
        while let Some(file) = open.pop() {
            open.extend(edges[file].iter().map(String::as_str).filter(|next| reached.insert(*next)));
        }
        reached.contains(start)
    };
    edges.keys().filter(|file| reaches_itself(file)).map(ToString::to_string).collect()
}

#[test]
fn folders_import_what_stands_above() {
    let files = sources();
    assert!(files.len() > 50, "{}", files.len());
    assert_eq!(upward(&files), []);
    for folder in FOLDERS {
        assert!(files.keys().any(|file| file.starts_with(folder)), "{folder}");
    }
}

#[test]
fn files_import_each_other_in_no_circle() {
    assert_eq!(in_circles(&sources()), [""; 0]);
}

#[test]
fn what_is_planted_is_found() {
    let planted = |file: &str, line: &str| {
        let mut files = sources();
        let text = files.get_mut(file).unwrap();
        text.insert_str(0, line);
        files
    };
    for (file, line, imported) in [
        ("problem/mask.rs", "use crate::device::Device;\n", "device/mod.rs"),
        ("kernel/variant.rs", "fn f() { crate::plan::slice::f() }\n", "plan/slice.rs"),
        ("plan/slice.rs", "use super::super::exec::{pipeline::Pipeline};\n", "exec/pipeline.rs"),
        ("cache/block_table.rs", "use crate::timing::Timer;\n", "timing.rs"),
    ] {
        assert_eq!(upward(&planted(file, line)), [(file.to_string(), imported.to_string())]);
    }
    // In a comment, or within a folder, it is none.
    assert_eq!(upward(&planted("problem/mask.rs", "// crate::device::Device\n")), []);
    let circle = in_circles(&planted("problem/options.rs", "use super::shape::Problem;\n"));
    assert!(circle.contains(&"problem/options.rs".to_string()) && circle.contains(&"problem/shape.rs".to_string()));
}

/// The lines of a text that name a kernel, or ask which one it is.
fn naming_a_kernel(text: &str) -> Vec<&str> {
    let names = Kernel::TILED.map(Kernel::name).into_iter().chain([
        "delta",
        "d_sink_logits",
        "key_scales",
        "query_scales",
        "mask_bits",
        "d_alibi_slopes",
        "merge",
    ]);
    let marks: Vec<String> = names.map(|name| format!("Kernel::{}", name.to_uppercase())).collect();
    let asks = ["kernel ==", "kernel !=", "kernel in"];
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let is_jinja = |line: &str| line.contains("{%") || line.contains("{{") || line.trim_start().starts_with("# ");
    code.filter(|line| {
        marks.iter().any(|mark| line.replace("MicroKernel::", "").contains(mark))
            || is_jinja(line) && asks.iter().any(|ask| line.contains(ask))
    })
    .collect()
}

/// A kernel is described in src/kernel and its entry shader; the plan, what runs it and the templates that kernels share take its
/// description.
#[test]
fn plans_and_shared_templates_name_no_kernel() {
    for (file, text) in sources() {
        if file.starts_with("plan/") || file.starts_with("exec/") {
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            assert_eq!(naming_a_kernel(code), [""; 0], "{file}");
        }
    }
    let shaders = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let mut shared = 0;
    for folder in [".", "portable", "cooperative"] {
        for entry in fs::read_dir(shaders.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "wgsl") {
                continue;
            }
            assert_eq!(naming_a_kernel(&fs::read_to_string(&path).unwrap()), [""; 0], "{}", path.display());
            shared += 1;
        }
    }
    assert!(shared > 30, "{shared}");
    let planted = [
        "let k = Kernel::D_KV;",
        "{% if kernel == \"forward\" %}",
        "# if kernel == \"forward\"",
        "match Kernel::MASK_BITS {",
    ];
    for planted in planted {
        assert_eq!(naming_a_kernel(planted), [planted]);
    }
    assert_eq!(naming_a_kernel("// Kernel::D_Q\nMicroKernel::Portable"), [""; 0]);
}
