//! The table of features in docs/FEATURES.md: every cell of ours names its tests, and those are there; and every file of tests is
//! part of the program that runs.

use std::fs;
use std::path::Path;

/// What a cell without tests may say.
const UNTESTED: [&str; 3] = ["0.1.0, not published", "not tested", "not yet"];

fn read(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

/// Our cells, as (feature, cell).
fn cells(features: &str) -> Vec<(&str, &str)> {
    let section =
        features.split("\n## ").find(|section| section.starts_with("Features\n")).expect("a section of features");
    let rows = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    cells.map(|cells| (cells[1], cells[2])).collect()
}

/// The tests that a cell names: `tests/PROGRAM/FILE.rs::NAME`, in a module `tests/PROGRAM/FILE.rs::MODULE::NAME`.
fn named(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// What stands between the line that opens a block and the one that closes it, both unindented, and the rest.
fn block(source: &str, open: &str) -> (String, String) {
    let (mut inside, mut outside, mut within) = (String::new(), String::new(), false);
    for line in source.lines() {
        match line {
            line if line == open => within = true,
            "}" if within => within = false,
            line => {
                let part = if within { &mut inside } else { &mut outside };
                part.push_str(line);
                part.push('\n');
            }
        }
    }
    (inside, outside)
}

/// Whether a source has a test that runs, at the top or in a module: a function marked so, or one in a list of `both!`,
/// which makes a test of it for each element type.
fn has_test(source: &str, path: &[&str]) -> bool {
    let (source, name) = match path {
        [name] => {
            let modules = source.lines().filter(|line| line.starts_with("mod ") && line.ends_with('{'));
            (modules.fold(source.to_string(), |source, module| block(&source, module).1), name)
        }
        [module, name] => (block(source, &format!("mod {module} {{")).0, name),
        _ => return false,
    };
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let function = format!("fn {name}(");
    let marked = lines.iter().enumerate().any(|(n, line)| {
        let attributes = lines[..n].iter().rev().take_while(|line| line.starts_with("#["));
        let attributes: Vec<&&str> = attributes.collect();
        line.starts_with(&function)
            && attributes.iter().any(|line| **line == "#[test]")
            && !attributes.iter().any(|line| line.starts_with("#[ignore"))
    });
    let generic = format!("fn {name}<");
    let listed = block(&source, "both! {").0.lines().any(|line| line.trim() == *name);
    marked || listed && lines.iter().any(|line| line.starts_with(&generic))
}

fn check(cell: &str) -> Result<(), String> {
    if named(cell).next().is_none() && !UNTESTED.contains(&cell) {
        return Err("no test is named".into());
    }
    for test in named(cell) {
        let (file, path) = test.split_once("::").ok_or_else(|| format!("{test} is not the path of a test"))?;
        let source = read(file).ok_or_else(|| format!("there is no file {file}"))?;
        if !has_test(&source, &path.split("::").collect::<Vec<_>>()) {
            return Err(format!("there is no test {test}"));
        }
    }
    Ok(())
}

#[test]
fn every_cell_names_tests_that_are_there() {
    let features = read("docs/FEATURES.md").unwrap();
    let cells = cells(&features);
    assert!(cells.len() >= 25, "{cells:#?}");
    let errors: Vec<String> =
        cells.iter().filter_map(|(feature, cell)| Some(format!("{feature}: {}", check(cell).err()?))).collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

/// The files and folders of a program of tests that its `main.rs` has not as modules.
fn left_out<'a>(main: &str, entries: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let lines: Vec<&str> = main.lines().collect();
    let runs = |entry: &&str| lines.contains(&format!("mod {};", entry.trim_end_matches(".rs")).as_str());
    entries.into_iter().filter(|entry| !runs(entry)).collect()
}

#[test]
fn every_file_of_tests_is_run() {
    for (program, known) in
        [("tests/host", "readme.rs"), ("tests/gpu", "forward.rs"), ("crates/cli/tests/cli", "run.rs")]
    {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(program);
        let entries = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let entries: Vec<String> = entries.filter(|entry| entry != "main.rs").collect();
        assert!(entries.iter().any(|entry| entry == known), "{entries:?}");
        let main = read(&format!("{program}/main.rs")).unwrap();
        assert_eq!(left_out(&main, entries.iter().map(String::as_str)), [""; 0], "{program}");
    }
    assert_eq!(left_out("mod forward;\nmod cpu;\n", ["forward.rs", "cpu", "new.rs", "gpu"]), ["new.rs", "gpu"]);
    for program in ["host", "gpu"] {
        let main = read(&format!("tests/{program}/main.rs")).unwrap();
        for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/both")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(main.contains(&format!("#[path = \"../both/{name}\"]\nmod ")), "{program}: {name}");
        }
    }
    // Files beside the programs would be run by none.
    let tests = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")).unwrap();
    let files = tests.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(files.filter(|name| name.ends_with(".rs")).collect::<Vec<_>>(), [""; 0]);
}

/// A test that is renamed, no longer marked, ignored or moved must be noticed.
#[test]
fn tests_that_are_not_there_are_noticed() {
    let source = "both! {\n    widths\n    gone\n}\n\nfn widths<T>() {}\n\nfn unlisted<T>() {}\n\nfn helper() {}\n
#[test]\nfn top() {}\n\n#[test]\n#[ignore = \"slow\"]\nfn slow() {}\n\nmod backward {\n    #[test]\n    fn inner() {}\n}\n";
    for there in [&["widths"][..], &["top"], &["backward", "inner"]] {
        assert!(has_test(source, there), "{there:?}");
    }
    for missing in [
        &["gone"][..],
        &["unlisted"],
        &["helper"],
        &["slow"],
        &["inner"],
        &["backward", "top"],
        &["forward", "inner"],
        &["backward", "deeper", "inner"],
        &["to"],
    ] {
        assert!(!has_test(source, missing), "{missing:?}");
    }
    for wrong in
        ["yes", "yes: `tests/gone.rs::top`", "yes: `tests/host/readme.rs`", "yes: `tests/host/readme.rs::gone`"]
    {
        check(wrong).unwrap_err();
    }
    check("yes: `tests/host/readme.rs::tests_that_are_not_there_are_noticed`").unwrap();
}
