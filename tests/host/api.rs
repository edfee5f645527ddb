//! The public names.

/// Names at the root of the crate: modules, and what is handed on there.
fn root() -> Vec<String> {
    let text = include_str!("../../src/lib.rs");
    let mut names = Vec::new();
    let mut depth = 0;
    let mut rest = String::new();
    for line in text.lines().filter(|line| !line.trim_start().starts_with("//") && !line.starts_with("#!")) {
        // What a module of the root holds is not at the root.
        if depth == 0 {
            rest.push_str(line);
            rest.push('\n');
        }
        let is_module = line.starts_with("pub mod ") && line.ends_with('{');
        depth += usize::from(is_module);
        depth -= usize::from(depth > 0 && line == "}");
    }
    for item in rest.split(';') {
        let item = item.trim_start_matches(|c: char| c != 'p' || c.is_whitespace());
        let item = item.rsplit_once("pub use ").map(|(_, item)| item).or_else(|| Some(item.rsplit_once("pub mod ")?.1));
        let Some(item) = item else { continue };
        let last = item.trim_end().rsplit("::").next().unwrap();
        let list = last.trim_matches(|c: char| "{}".contains(c) || c.is_whitespace());
        names.extend(list.split(',').map(|name| name.trim().to_string()).filter(|name| !name.is_empty()));
    }
    // `pub mod name {` has no semicolon.
    names.extend(text.lines().filter_map(|line| Some(line.strip_prefix("pub mod ")?.strip_suffix(" {")?.to_string())));
    names.sort();
    names.dedup();
    names
}

#[test]
fn the_root_has_few_names() {
    let names = root();
    for name in ["Attention", "Problem", "Window", "cache", "tuning", "wgpu"] {
        assert!(names.iter().any(|found| found == name), "{name} is not found among {names:?}");
    }
    assert!(names.len() <= 40, "{} names at the root: {names:?}", names.len());
}
