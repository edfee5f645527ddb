//! The number of cases of a test.

/// Whether all cases are wanted: `SINK_ATTENTION_TESTS=all`. Otherwise every option, element type, kernel and error has its cases, but
/// there are fewer of them, because a software driver compiles each kernel for a second or more. Widths and tiles are fewer, and element
/// types take turns with options.
pub fn all_cases() -> bool {
    match std::env::var_os("SINK_ATTENTION_TESTS") {
        None => false,
        Some(value) if value == "all" => true,
        Some(value) => panic!("SINK_ATTENTION_TESTS is {value:?}, which is not \"all\""),
    }
}

/// The usual cases. Also the other cases if all are wanted.
pub fn with_others<T>(usual: impl IntoIterator<Item = T>, others: impl IntoIterator<Item = T>) -> Vec<T> {
    usual.into_iter().chain(others.into_iter().filter(|_| all_cases())).collect()
}

/// The first of `nth` cases, and each case that comes `nth` later. Every case if all are wanted.
pub fn every<T>(nth: usize, cases: impl IntoIterator<Item = T>) -> Vec<T> {
    cases.into_iter().step_by(if all_cases() { 1 } else { nth }).collect()
}

/// A number of random cases, or the larger number if all are wanted.
pub fn this_many(usual: u32, all: u32) -> u32 {
    if all_cases() { all } else { usual }
}

/// Every text of a shader if all cases are wanted, or `SINK_ATTENTION_SHADERS=all` as in tests/run.sh. Otherwise each sixteenth, for use
/// while writing, because all of them take minutes.
pub fn texts<T>(all: impl IntoIterator<Item = T>) -> Vec<T> {
    let every = match std::env::var_os("SINK_ATTENTION_SHADERS") {
        None => all_cases(),
        Some(value) if value == "all" => true,
        Some(value) => panic!("SINK_ATTENTION_SHADERS is {value:?}, which is not \"all\""),
    };
    all.into_iter().step_by(if every { 1 } else { 16 }).collect()
}
