//! The built binary: `bench` and `tune`, and the script that joins their figures with PyTorch's.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::binary::{command, fails, sink_attention, succeeds, wrong_usage};
use serde_json::{Value, json};
use sink_attention::plan::Capabilities;
use sink_attention::testing::devices::gpu;
use sink_attention::tuning::{REPORT_FORMAT, TUNING_VARIABLE, Tuning};

/// A shape that takes no time.
const SMALL: [&str; 10] = ["--heads", "2", "--kv-heads", "1", "--seq-k", "48", "--head-dim", "16", "--runs", "3"];

/// A folder that is gone when the test is over.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("sink-attention-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().into()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn bench(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeeds(&[&["bench", "--json", "-"], arguments].concat()).0).unwrap()
}

fn small(backend: &str, more: &[&str]) -> Value {
    bench(&[&["--backend", backend], &SMALL[..], more].concat())
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {value}"))
}

/// The figures of a row follow from its time.
fn check_row(row: &Value, pass: &str) {
    assert_eq!(row["pass"], pass);
    assert_eq!(row["skipped"], Value::Null, "{row}");
    let (ms, least, most) = (number(row, "ms"), number(row, "min_ms"), number(row, "max_ms"));
    assert!(0.0 < least && least <= ms && ms <= most, "{row}");
    assert_eq!(row["disturbed"], most > 1.5 * least, "{row}");
    let flops = 4.0 * 16.0 * 2.0 * f64::from(48 * 49 / 2) * if pass == "forward" { 1.0 } else { 2.5 };
    assert!((number(row, "tflops") / (flops / ms * 1e-9) - 1.0).abs() < 1e-9, "{row}");
    // q, o, k and v, two heads and one; lse and the sink logits.
    let forward = 4 * (48 * 16 * (2 + 2 + 1 + 1) + 2 * 48 + 2);
    let bytes = if pass == "forward" { forward } else { forward + 4 * (48 * 16 * 6 + 2) };
    assert!((number(row, "gb_per_s") / (f64::from(bytes) / ms * 1e-6) - 1.0).abs() < 1e-9, "{row}");
}

#[test]
fn bench_on_the_cpu() {
    let report = small("cpu", &["--dtype", "f32,f16"]);
    assert!(report["device"].as_str().unwrap().starts_with("CPU"));
    assert!(report["clock"].as_str().unwrap().contains("wall clock"));
    assert_eq!(report["shortened"], false);
    let rows = report["rows"].as_array().unwrap();
    check_row(&rows[0], "forward");
    check_row(&rows[1], "backward");
    let kinds: Vec<_> = rows.iter().map(|row| (&row["dtype"], &row["pass"], &row["kernel"])).collect();
    let kind = |dtype, pass| (json!(dtype), json!(pass), json!("cpu"));
    let expected = [kind("f32", "forward"), kind("f32", "backward"), kind("f16", "forward"), kind("f16", "backward")];
    assert_eq!(kinds, expected.each_ref().map(|(dtype, pass, kernel)| (dtype, pass, kernel)));
    assert_eq!(rows[0]["first_call_ms"], Value::Null);
}

#[test]
fn bench_on_the_gpu() {
    if gpu().is_none() {
        return;
    }
    let report = small("gpu", &["--passes"]);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for (row, (pass, kernels)) in
        rows.iter().zip([("forward", &["forward"][..]), ("backward", &["delta", "d_sink_logits", "d_q", "d_kv"])])
    {
        check_row(row, pass);
        assert_eq!(row["kernel"], "portable");
        assert!(number(row, "first_call_ms") > 0.0);
        let split = row["kernels"].as_array().unwrap();
        assert_eq!(split.iter().map(|kernel| kernel["kernel"].as_str().unwrap()).collect::<Vec<_>>(), kernels);
        assert!(split.iter().all(|kernel| number(kernel, "ms") > 0.0));
    }
    for dtype in ["f16", "bf16"] {
        let report = small("gpu", &["--dtype", dtype]);
        let row = &report["rows"][1];
        assert_eq!((&row["dtype"], &row["pass"], &row["skipped"]), (&json!(dtype), &json!("backward"), &Value::Null));
        assert!(number(row, "ms") > 0.0);
    }
    let report = small("gpu", &["--pass", "backward", "--full", "--sinks", "none", "--layout", "bhsd"]);
    let row = &report["rows"].as_array().unwrap()[..];
    assert_eq!(row.len(), 1);
    assert_eq!(
        (&row[0]["pass"], &row[0]["causal"], &row[0]["sink_logits"]),
        (&json!("backward"), &json!(false), &json!(false))
    );
}

/// A candidate is measured by its tiles' name, and the figures tell what ran.
#[test]
fn bench_of_given_tiles() {
    if gpu().is_none() {
        return;
    }
    let tiles = "portable 32x32 (8x8 threads of 4x4), k_step 16, n_step 32";
    let given = ["--tiles", &format!("forward={tiles}"), "--tiles", &format!("d_kv={tiles}")];
    let report = small("gpu", &given);
    let ran = |report: &Value| {
        let kernels = report["rows"].as_array().unwrap().iter().flat_map(|row| row["kernels"].as_array().unwrap());
        let tiled = kernels.filter(|kernel| kernel["tiles"].is_string()).map(|kernel| {
            assert_eq!(kernel.get("ms"), None, "not asked for: {kernel}");
            (kernel["kernel"].as_str().unwrap().to_string(), kernel["tiles"].as_str().unwrap().to_string())
        });
        tiled.collect::<Vec<_>>()
    };
    let [forward, d_q, d_kv] = &ran(&report)[..] else { panic!("{report}") };
    assert_eq!([forward, d_kv], [&("forward".into(), tiles.into()), &("d_kv".into(), tiles.into())]);
    assert_ne!(*ran(&small("gpu", &[]))[0].1, *tiles);
    assert_eq!(d_q.1, ran(&small("gpu", &[]))[1].1);
    let table = succeeds(&[&["bench", "--backend", "gpu", "--pass", "forward"], &SMALL[..], &given].concat()).0;
    assert!(table.contains("custom f32 forward: Forward, portable f32, vec4 loads, tiles 32x32 (8x8"), "{table}");

    // What does not fit is a row with its reason, as is a micro-kernel for which there are no tiles.
    let skipped = |arguments: &[&str]| {
        let all = [&["bench", "--json", "-", "--backend", "gpu", "--pass", "forward"], &SMALL[..], arguments].concat();
        let output = sink_attention(&all);
        assert_eq!(output.status.code(), Some(1));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["rows"][0]["skipped"].as_str().unwrap().to_string()
    };
    let reason = skipped(&["--tiles", "forward=cooperative 4x1x1x2"]);
    assert!(reason.contains("f32 operands need the portable micro-kernel"), "{reason}");
    let reason = skipped(&["--kernel", "portable", "--tiles", "forward=cooperative 4x1x1x2"]);
    assert!(reason.contains("asked for as portable and with the tiles \"cooperative 4x1x1x2\""), "{reason}");
    let huge = "forward=portable 1024x32 (128x8 threads of 8x4), k_step 256, n_step 32";
    let reason = skipped(&["--tiles", huge]);
    assert!(reason.contains("bytes of workgroup memory"), "{reason}");
}

#[test]
fn bench_of_the_default_shapes() {
    let report = bench(&["--backend", "cpu", "--pass", "forward", "--runs", "1"]);
    assert_eq!(report["shortened"], true, "without a GPU the defaults would take minutes");
    let rows = report["rows"].as_array().unwrap();
    let shapes: Vec<_> = rows
        .iter()
        .map(|row| {
            let of = |key| row[key].as_u64();
            (row["name"].as_str().unwrap(), [of("heads"), of("kv_heads"), of("seq_q"), of("head_dim"), of("window")])
        })
        .collect();
    let numbers = |numbers: [u64; 4], window| {
        let [heads, kv_heads, seq, width] = numbers.map(Some);
        [heads, kv_heads, seq, width, window]
    };
    assert_eq!(
        shapes,
        [
            ("gpt-oss", numbers([64, 8, 256, 64], None)),
            ("window", numbers([64, 8, 256, 64], Some(128))),
            ("llama", numbers([32, 8, 256, 128], None)),
            ("seed", numbers([16, 16, 128, 64], None)),
        ]
    );
    assert!(rows.iter().all(|row| row["causal"] == true && row["sink_logits"] == true && row["batch"] == 1));
    // A length that is given stays, and the other numbers of the shape too.
    let report =
        bench(&["--backend", "cpu", "--pass", "forward", "--shape", "seed", "--seq-k", "100", "--window", "7"]);
    let row = &report["rows"][0];
    assert_eq!((&row["seq_k"], &row["heads"], &row["window"]), (&json!(100), &json!(16), &json!(7)));
    assert_eq!(report["shortened"], false);
}

#[test]
fn bench_writes_files() {
    let folder = Folder::new("bench");
    let (json, svg) = (folder.file("figures.json"), folder.file("figures.svg"));
    let (people, _) = succeeds(&[&["bench", "--backend", "cpu", "--json", &json, "--svg", &svg], &SMALL[..]].concat());
    for word in ["CPU", "wall clock", "| custom | f32   | forward", "| custom | f32   | backward", "TFLOP/s", "GB/s"] {
        assert!(people.contains(word), "no {word:?} in\n{people}");
    }
    let table = people.lines().filter(|line| line.starts_with('|'));
    let widths: Vec<usize> = table.map(|line| line.chars().count()).collect();
    assert!(widths.len() == 4 && widths.iter().all(|width| *width == widths[0] && *width <= 120), "{people}");
    let report: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    check_row(&report["rows"][0], "forward");
    let svg = fs::read_to_string(&svg).unwrap();
    assert!(svg.contains("<svg") && svg.contains("custom f32 backward") && svg.matches("<rect").count() >= 3, "{svg}");
    let stderr =
        sink_attention(&[&["bench", "--backend", "cpu", "--svg", &folder.file("no/where")], &SMALL[..]].concat());
    assert_eq!(stderr.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&stderr.stderr).contains("no/where"));
}

/// What does not fit is a row with its reason; nothing measured at all is no success.
#[test]
fn bench_of_sizes_that_do_not_fit() {
    let Some(device) = gpu().and_then(|gpu| gpu.device()) else { return };
    let most = device.capabilities().buffer_bytes / (64 * 2 * 4) + 1;
    let arguments = ["bench", "--json", "-", "--backend", "gpu", "--heads", "2", "--pass", "forward"];
    let too_long = sink_attention(&[&arguments[..], &["--seq-k", &most.to_string(), "--window", "8"]].concat());
    assert_eq!(too_long.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&too_long.stdout).unwrap();
    let row = &report["rows"][0];
    assert!(row["skipped"].as_str().unwrap().contains("bytes"), "{row}");
    assert_eq!(row.get("ms"), None, "{row}");
    let stderr = String::from_utf8_lossy(&too_long.stderr).into_owned();
    assert!(stderr.contains("nothing could be measured on"), "{stderr}");
}

#[test]
fn bench_of_decoding() {
    if gpu().is_none() {
        return;
    }
    let report = small("gpu", &["--decode", "--dtype", "f16", "--batch", "2", "--page-size", "32"]);
    let rows = report["rows"].as_array().unwrap();
    let kinds: Vec<_> = rows.iter().map(|row| row["cache"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["contiguous", "pages of 32"]);
    for row in rows {
        let us = number(&row["decode"], "median_us");
        assert!(us > 0.0 && number(&row["step"], "min_us") > 0.0 && number(&row["append"], "max_us") > 0.0, "{row}");
        let bytes = f64::from(2 * 48 * (16 + 16) * 2);
        assert!((number(row, "gb_per_s") / (bytes / us * 1e-3) - 1.0).abs() < 1e-9, "{row}");
    }
    let tiling = "32x4 rows 1, steps 2 by 1, splits 3";
    let quantised = small("gpu", &["--decode", "--quantised", "--decode-tiling", tiling]);
    assert_eq!(quantised["rows"][0]["dtype"], "f32 q8_0");
    assert_eq!(quantised["rows"][0]["tiling"], tiling);
    let tree = small("gpu", &["--decode", "--alibi", "--tree"]);
    assert!(
        tree["rows"][0]["tree"] == true && tree["rows"][0]["alibi"] == true && quantised["rows"][0]["tree"] == false
    );
    let stderr = fails(&["bench", "--decode", "--page-size", "24", "--heads", "2", "--kv-heads", "1", "--seq-k", "9"]);
    assert!(stderr.contains("24; it must be a power of two"), "{stderr}");
    let stderr = fails(&["bench", "--decode", "--seq-k", &usize::MAX.to_string()]);
    assert!(stderr.contains("seq_k is 18446744073709551615"), "{stderr}");
}

#[test]
fn bench_refuses() {
    wrong_usage(&["bench", "--decode", "--full"], "cannot be used with");
    wrong_usage(&["bench", "--page-size", "16"], "--decode");
    wrong_usage(&["bench", "--tree"], "--decode");
    wrong_usage(&["bench", "--alibi"], "--decode");
    wrong_usage(&["bench", "--decode", "--decode-tiling", "32x8"], "splits 330");
    let stderr = fails(&["bench", "--decode", "--backend", "cpu"]);
    assert!(stderr.contains("bench --decode needs a GPU"), "{stderr}");
    wrong_usage(&["bench", "--window", "0"], "at least the query's own key");
    wrong_usage(&["bench", "--full", "--causal"], "cannot be used with");
    wrong_usage(&["bench", "--full", "--window", "3"], "cannot be used with");
    wrong_usage(&["bench", "--runs", "0"], "--runs");
    wrong_usage(&["bench", "--dtype", "f64"], "bf16");
    wrong_usage(&["bench", "--shape", "huge"], "gpt-oss");
    wrong_usage(&["bench", "--backend", "cpu", "--tuning", "x"], "cannot be used with");
    let stderr = fails(&["bench", "--backend", "cpu", "--heads", "5", "--kv-heads", "2"]);
    assert!(stderr.contains("heads (5) must be a multiple of kv_heads (2)"), "{stderr}");
    wrong_usage(&["bench", "--backend", "cpu", "--kernel", "cooperative"], "cannot be used with");
    wrong_usage(&["bench", "--backend", "cpu", "--tiles", "forward=cooperative 4x1x1x2"], "cannot be used with");
    wrong_usage(&["bench", "--tiles", "forward"], "want KERNEL=TILES");
    wrong_usage(&["bench", "--tiles", "delta=cooperative 4x1x1x2"], "known: forward, exact_delta, d_q, d_kv");
    wrong_usage(
        &["bench", "--tiles", "forward=cooperative 4x1x1"],
        "subgroups x row fragments x column fragments x stages",
    );
    wrong_usage(&["bench", "--tiles", "forward=portable 64x32"], "k_step 32, n_step 16");
}

fn tune(out: &str, arguments: &[&str]) -> Value {
    let fixed = ["tune", "--json", "--head-dim", "16", "--budget", "2", "--out", out];
    serde_json::from_str(&succeeds(&[&fixed[..], arguments].concat()).0).unwrap()
}

#[test]
fn tune_writes_what_the_library_loads() {
    let Some(gpu) = gpu() else { return };
    let name = gpu.device().unwrap().capabilities().name.clone();
    let folder = Folder::new("tune");
    let file = folder.file("device.tuning");
    let summary = tune(&file, &["--masks", "short", "--kernels", "forward,d_kv"]);
    assert_eq!(summary["dropped"], json!([]), "all candidates compute the same");
    let keys = summary["entries"].as_array().unwrap().iter().map(|entry| &entry["key"]);
    // On a slow machine the time may be up before the second.
    let keys: Vec<_> = keys.chain(summary["not_measured"].as_array().unwrap()).collect();
    assert_eq!(keys, ["forward f32 width 32 short", "d_kv f32 width 32 short"]);
    let measured = summary["entries"].as_array().unwrap().len();
    assert!(measured > 0);
    for entry in summary["entries"].as_array().unwrap() {
        assert!(number(entry, "ms") <= number(entry, "built_in_ms") && number(entry, "tried") >= 1.0, "{entry}");
    }
    let tuning = Tuning::load(&file).unwrap();
    assert_eq!((tuning.device(), tuning.entries().len()), (&*name, measured));
    assert_eq!(tuning.entries()[0].1.to_string(), summary["entries"][0]["tiles"]);

    // Measured again, other entries stay.
    tune(&file, &["--masks", "window", "--kernels", "forward"]);
    assert_eq!(Tuning::load(&file).unwrap().entries().len(), measured + 1);

    let shape = ["--backend", "gpu", "--heads", "2", "--seq-k", "400", "--head-dim", "20", "--causal"];
    let plan = |more: &[&str]| succeeds(&[&["plan"], &shape[..], more].concat()).0;
    assert!(plan(&["--tuning", &file]).contains("from the tuning"));
    assert!(plan(&[]).contains("from the built-in table"));
    let environment = command(&[&["plan"], &shape[..]].concat()).env(TUNING_VARIABLE, &file).output().unwrap();
    assert!(String::from_utf8_lossy(&environment.stdout).contains("from the tuning"));
    let checked = succeeds(&["check", "--backend", "gpu", "--only", "scale", "--tuning", &file]).0;
    assert!(checked.trim_end().ends_with("all passed"), "{checked}");
}

/// Both commands add to one file, which is a table of tiles, too.
#[test]
fn check_and_tune_write_one_report() {
    let Some(gpu) = gpu() else { return };
    let name = gpu.device().unwrap().capabilities().name.clone();
    let folder = Folder::new("report");
    let (report, out) = (folder.file("report.json"), folder.file("device.tuning"));
    let read = || -> Value { serde_json::from_str(&fs::read_to_string(&report).unwrap()).unwrap() };
    let check = ["check", "--backend", "gpu", "--only", "scale", "--report", &report];
    succeeds(&check);
    let first = read();
    assert_eq!((&first["format"], &first["device"]), (&json!(REPORT_FORMAT), &json!(name)));
    assert_eq!(first["adapter"]["name"], json!(name));
    assert!(first["adapter"]["workgroup_bytes"].is_number() && first["driver"].is_string(), "{first}");
    assert_eq!(first["runs"][0]["command"], "check --backend gpu --only scale");
    assert_eq!((&first["runs"][0]["result"]["failed"], &first["tuning"]), (&json!(0), &json!([])));
    // A table without entries would be no use.
    let plan = ["plan", "--backend", "gpu", "--heads", "2", "--seq-k", "400", "--head-dim", "20", "--causal"];
    let with_report = [&plan[..], &["--tuning", &report]].concat();
    assert!(fails(&with_report).contains("the report has no tiles; `sink-attention tune --report` adds them"));

    let summary = tune(&out, &["--masks", "short", "--kernels", "forward", "--report", &report]);
    let tiles = &summary["entries"][0]["tiles"];
    let both = read();
    assert_eq!(both["runs"].as_array().unwrap().len(), 2);
    assert_eq!(both["runs"][0], first["runs"][0]);
    assert_eq!(both["runs"][1]["result"]["entries"], summary["entries"]);
    assert_eq!(both["tuning"], json!([format!("forward f32 width 32 short: {}", tiles.as_str().unwrap())]));
    // The table of both files is one.
    assert_eq!(Tuning::load(&report).unwrap(), Tuning::load(&out).unwrap());
    assert!(succeeds(&with_report).0.contains("from the tuning"));
    let environment = command(&plan).env(TUNING_VARIABLE, &report).output().unwrap();
    assert!(String::from_utf8_lossy(&environment.stdout).contains("from the tuning"));

    // Again: in the place of the last time, and the tiles stay.
    succeeds(&check);
    let again = read();
    let commands: Vec<_> = again["runs"].as_array().unwrap().iter().map(|run| &run["command"]).collect();
    assert_eq!((commands.len(), commands[1]), (2, &json!("check --backend gpu --only scale")));
    assert_eq!(again["tuning"], both["tuning"]);

    // A report is not replaced by a table.
    let stderr = fails(&["tune", "--backend", "gpu", "--out", &report]);
    assert!(stderr.contains("is a report: name it by --report"), "{stderr}");
    let stderr = fails(&["tune", "--backend", "gpu", "--out", &report, "--report", &report]);
    assert!(stderr.contains("--report and --out both name"), "{stderr}");
    assert_eq!(read(), again);
}

#[test]
fn reports_that_are_wrong() {
    let folder = Folder::new("wrong-report");
    let file = folder.file("report.json");
    let check = ["check", "--backend", "cpu", "--only", "scale", "--report", &file];
    let report = |device: &str, entry: &str| {
        let tuning: Vec<&str> = Some(entry).filter(|entry| !entry.is_empty()).into_iter().collect();
        json!({ "format": REPORT_FORMAT, "device": device, "driver": "", "tuning": tuning, "runs": [] }).to_string()
    };
    for (text, message) in [
        (report("Voodoo 2", ""), "is a report of \"Voodoo 2\", and this device is \"CPU ("),
        ("{ \"format\": \"sink-attention report 2\" }".into(), "its format is \"sink-attention report 2\", not"),
        ("{ \"format\": \"sink-attention report 1\" }".into(), "missing field `device`"),
        ("[1, 2]".into(), "its format is null"),
        ("{".into(), "line 1 column 1"),
        ("sink-attention tuning 1\n".into(), "is no report"),
        (report("Voodoo 2", "forward f32 width 65 long: portable"), "line 4: unknown width \"65\""),
    ] {
        fs::write(&file, &text).unwrap();
        let stderr = fails(&check);
        assert!(stderr.contains(message) && stderr.contains("report.json"), "no {message:?} in {stderr}");
        assert_eq!(fs::read_to_string(&file).unwrap(), text, "a file that is none of ours is left as it is");
    }
    // As a tuning.
    fs::write(&file, report("Voodoo 2", "forward f32 width 65 long: portable")).unwrap();
    let stderr = fails(&["plan", "--device", "H200", "--tuning", &file]);
    assert!(stderr.contains("entry 1 of \"tuning\": unknown width \"65\"; known: 32, 64, 128, 256"), "{stderr}");
    let tiles = "forward f32 width 64 long: portable 32x32 (8x8 threads of 4x4), k_step 16, n_step 16";
    fs::write(&file, report("Voodoo 2", tiles)).unwrap();
    let stderr = fails(&["plan", "--device", "H200", "--tuning", &file]);
    assert!(stderr.contains("Voodoo 2"), "{stderr}");
    // A report of the CPU, which has no tiles; a run of one seed is another than that of another.
    fs::remove_file(&file).unwrap();
    succeeds(&check);
    succeeds(&[&check[..], &["--seed", "3"]].concat());
    let written: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!((written["runs"].as_array().unwrap().len(), &written["adapter"]), (2, &Value::Null));
    for path in ["/dev/full", &folder.file("no/file")] {
        let stderr = fails(&["check", "--backend", "cpu", "--only", "scale", "--report", path]);
        assert!(stderr.contains(&format!("cannot write {path}")), "{stderr}");
    }
}

#[test]
fn tunings_that_are_wrong() {
    let folder = Folder::new("wrong-tuning");
    let file = folder.file("tuning");
    let refused = |message: &str| {
        for arguments in [
            &["plan", "--device", "H200", "--tuning", &file][..],
            &["check", "--quick", "--backend", "gpu", "--tuning", &file],
            &["bench", "--backend", "gpu", "--tuning", &file],
            &["tune", "--backend", "gpu", "--out", &file],
        ] {
            if arguments[0] == "plan" || gpu().is_some() {
                let stderr = fails(arguments);
                assert!(stderr.contains(message), "no {message:?} in {stderr}");
            }
        }
    };
    fs::write(&file, "sink-attention tuning 1\ndevice: Voodoo 2\ndriver:\n").unwrap();
    refused("Voodoo 2");
    fs::write(&file, "sink-attention tuning 1\ndevice: x\ndriver:\nforward f32 width 64 round: 1").unwrap();
    refused("line 4: unknown mask \"round\"; known: long, window, short");
    assert!(fails(&["plan", "--device", "H200", "--tuning", &folder.file("absent")]).contains("absent"));
    if gpu().is_some() {
        // The one of the environment gives way to the one that is named, and counts otherwise.
        let with = |arguments: &[&str]| command(arguments).env(TUNING_VARIABLE, &file).output().unwrap();
        let output = with(&["check", "--backend", "gpu", "--only", "scale"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("line 4"));
        let good = folder.file("good");
        let name = gpu().unwrap().device().unwrap().capabilities().name.clone();
        fs::write(&good, Tuning::new(&name, "").to_string()).unwrap();
        assert!(with(&["check", "--backend", "gpu", "--only", "scale", "--tuning", &good]).status.success());
    }
    // A device that is not here is planned for without the environment.
    let output = command(&["plan", "--device", "H200"]).env(TUNING_VARIABLE, &file).output().unwrap();
    assert!(output.status.success());
}

#[test]
fn plan_shows_a_tuning_of_a_sample_device() {
    let folder = Folder::new("sample");
    let file = folder.file("tuning");
    let name = &Capabilities::samples()[0].name;
    let tiles = "portable 32x32 (8x8 threads of 4x4), k_step 16, n_step 16";
    fs::write(&file, format!("sink-attention tuning 1\ndevice: {name}\ndriver:\nd_q f32 width 64 long: {tiles}\n"))
        .unwrap();
    let plan = succeeds(&["plan", "--device", "H200", "--backward", "--json", "--tuning", &file]).0;
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let origins = plan["launches"].as_array().unwrap().iter().map(|launch| launch["tiles"]["origin"].as_str());
    let origins: Vec<_> = origins.flatten().collect();
    assert_eq!(origins, ["built-in table", "tuning", "built-in table"]);
    let d_q = plan["launches"].as_array().unwrap().iter().find(|l| l["tiles"]["origin"] == "tuning").unwrap();
    assert_eq!(d_q["tiles"]["shape"], tiles);
}

/// A forced micro-kernel is the only one whose tiles are measured.
#[test]
fn tune_measures_what_is_asked_for() {
    let Some(gpu) = gpu() else { return };
    let has_matrices = gpu.device().unwrap().capabilities().cooperative.is_some();
    let folder = Folder::new("tune-kernel");
    let file = folder.file("device.tuning");
    let what = ["--masks", "short", "--kernels", "forward", "--dtype", "f16"];
    for (kernel, there) in [("portable", true), ("cooperative", has_matrices), ("auto", true)] {
        let arguments = [&what[..], &["--kernel", kernel]].concat();
        if !there {
            let stderr = fails(&[&["tune", "--head-dim", "16", "--out", &file], &arguments[..]].concat());
            assert!(stderr.contains("has no cooperative matrices"), "{stderr}");
            continue;
        }
        let summary = tune(&file, &arguments);
        assert_eq!(summary["dropped"], json!([]), "all candidates compute the same");
        let entry = &summary["entries"][0];
        assert_eq!(entry["key"], "forward f16 width 32 short");
        let tiles = entry["tiles"].as_str().unwrap();
        assert!(kernel == "auto" || tiles.starts_with(kernel), "{kernel}: {tiles}");
        assert_eq!(Tuning::load(&file).unwrap().entries()[0].1.to_string(), tiles);
        // Followed where nothing is forced.
        let shape = ["--backend", "gpu", "--dtype", "f16", "--seq-k", "400", "--head-dim", "20", "--causal"];
        let plan = succeeds(&[&["plan", "--tuning", &file], &shape[..]].concat()).0;
        assert!(plan.contains(&format!("tiles      {tiles} (")) && plan.contains("from the tuning"), "{plan}");
    }
}

#[test]
fn plan_shows_how_many_workgroups_run_at_a_time() {
    let plan = |device: &str| {
        let arguments = ["plan", "--device", device, "--seq-k", "4096", "--dtype", "f32"];
        let people = succeeds(&arguments).0;
        let plan: Value = serde_json::from_str(&succeeds(&[&arguments[..], &["--json"]].concat()).0).unwrap();
        (people, plan["launches"][0]["resident_workgroups"].clone())
    };
    let (people, count) = plan("H200");
    assert_eq!(count, 3);
    assert!(
        people.contains("128 threads, 15.5 KiB of 48 KiB workgroup memory, 3 at a time on a multiprocessor"),
        "{people}"
    );
    let (people, count) = plan("M2");
    assert_eq!((people.contains("multiprocessor"), count), (false, Value::Null));
}

#[test]
fn tune_refuses() {
    assert!(fails(&["tune", "--backend", "cpu"]).contains("tune needs a GPU"));
    wrong_usage(&["tune", "--budget", "0"], "--budget");
    wrong_usage(&["tune", "--kernels", "delta"], "d_kv");
    wrong_usage(&["tune", "--masks", "round"], "window");
    if gpu().is_some() {
        let stderr = fails(&["tune", "--backend", "gpu", "--out", "no such folder/tuning"]);
        assert!(stderr.contains("no such folder"), "{stderr}");
    }
}

fn compare(arguments: &[&str]) -> Option<std::process::Output> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/compare/compare.py");
    match Command::new("python3").arg(script).args(arguments).output() {
        Ok(output) => Some(output),
        Err(error) => {
            println!("python3 cannot be run, so the script is not tested: {error}");
            None
        }
    }
}

#[test]
fn compare_joins_the_figures_with_those_of_peers() {
    let folder = Folder::new("compare");
    let (own, peers) = (folder.file("own.json"), folder.file("peers.json"));
    let figures = bench(&[&["--backend", "cpu"], &SMALL[..]].concat());
    fs::write(&own, figures.to_string()).unwrap();
    let row = |pass: &str, n: usize, ms: Option<f64>| {
        json!({"shape": "custom", "B": 1, "H": 2, "G": 1, "M": n, "N": n, "D": 16, "E": 16, "window": null, "causal": true,
            "dtype": "f32", "implementation": format!("peer {n}"), "pass": pass, "ms": ms, "tflops": ms.map(|_| 2.5),
            "sinks": false, "note": if ms.is_some() { "" } else { "no such kernel" }})
    };
    let rows = [row("forward", 48, Some(1e-6)), row("forward", 49, Some(1.0)), row("backward", 48, None)];
    fs::write(&peers, json!({"torch": "PyTorch 0", "rows": rows}).to_string()).unwrap();
    let Some(output) = compare(&["--json", &own, "--peers-json", &peers]) else { return };
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table: Vec<&str> = text.lines().filter(|line| line.starts_with("| custom")).collect();
    // The fastest first; what was not measured here is left out.
    assert_eq!(table.len(), 3, "{text}");
    assert!(table[0].contains("| peer 48 | no | 0.000 | 2.5 |"), "{text}");
    assert!(table[1].contains("| f32 | forward | sink-attention, cpu | yes |"), "{text}");
    assert!(table[2].contains("| f32 | backward | sink-attention, cpu | yes |"), "{text}");
    assert!(text.contains("- peer 48: no such kernel (custom f32 backward)"), "{text}");
    assert!(!text.contains("peer 49") && text.contains("PyTorch 0"), "{text}");
}

#[test]
fn compare_runs_the_bench() {
    let binary = env!("CARGO_BIN_EXE_sink-attention");
    let Some(output) = compare(&["--bench", binary, "--no-peers", "--device", "cpu", "--tiny", "--dtypes", "f32"])
    else {
        return;
    };
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().filter(|line| line.contains("sink-attention, cpu")).count(), 6, "{text}");
    assert!(text.contains("window: B=1 H=8 G=2 N=128 D=64 window 32"), "{text}");
    for (arguments, message) in [
        (&["--json", "no such file"][..], "no such file"),
        (&[], "one of --bench and --json is needed"),
        (&["--bench", "no such binary", "--no-peers"], "no such binary"),
        (&["--bench", binary, "--peers", "magic"], "unknown 'magic', known: cudnn"),
    ] {
        let output = compare(arguments).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(message) && !stderr.contains("Traceback"), "{stderr}");
    }
}
