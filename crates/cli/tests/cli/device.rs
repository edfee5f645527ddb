//! The built binary: `devices`, `plan` and `check`.

use std::process::Output;

use crate::binary::{command, fails, sink_attention, succeeds, wrong_usage};
use serde_json::{Value, json};
use sink_attention::Device;
use sink_attention::device::{ADAPTER_VARIABLE, adapters};
use sink_attention::plan::{Capabilities, CooperativeMatrices, ElementLayout};
use sink_attention::testing::cases::all_cases;
use sink_attention::testing::devices::gpu;

fn json_of(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeeds(&[arguments, &["--json"]].concat()).0).unwrap()
}

/// Runs the binary where the Vulkan loader finds no driver.
#[cfg(target_os = "linux")]
fn without_adapters(arguments: &[&str]) -> Output {
    let nowhere = "/nonexistent";
    command(arguments).env("VK_DRIVER_FILES", nowhere).env("VK_ICD_FILENAMES", nowhere).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn devices_lists_what_the_library_finds() {
    let list = json_of(&["devices"]);
    let adapters = adapters();
    let listed = list["adapters"].as_array().unwrap();
    assert_eq!(listed.len(), adapters.len());
    for (index, (entry, adapter)) in listed.iter().zip(&adapters).enumerate() {
        let offered = Capabilities::of_adapter(adapter);
        assert_eq!(entry["index"], index);
        assert_eq!(entry["name"], adapter.get_info().name);
        assert_eq!(entry["workgroup_bytes"], offered.workgroup_bytes);
        assert_eq!(entry["binding_bytes"], offered.binding_bytes);
        let matrices = offered.cooperative.map(|matrices| [matrices.side, matrices.lanes]);
        assert_eq!(entry["cooperative_matrices"], serde_json::json!(matrices));
        assert_eq!(entry["cooperative_error"].is_null(), matrices.is_some(), "either they are there, or the reason");
        let elements = ElementLayout::of_adapter(adapter);
        assert_eq!(entry["elements"], json!(elements.as_ref().ok().map(ToString::to_string)));
        assert_eq!(entry["elements_error"], json!(elements.err()));
        let bf16 = CooperativeMatrices::bf16_of_adapter(adapter);
        let rounding = bf16.as_ref().ok().map(ToString::to_string);
        assert_eq!((&entry["bf16"], &entry["bf16_rounding"]), (&json!(bf16.is_ok()), &json!(rounding)));
        assert_eq!(entry["bf16_error"], json!(bf16.err()));
        let spirv = offered.spirv.map(|version| version.to_string());
        assert_eq!(entry["spirv"], serde_json::json!(spirv));
        assert_eq!(entry["spirv_error"].is_null(), spirv.is_some(), "either it is taken, or the reason");
        let kernels = entry["kernels"].as_array().unwrap();
        assert_eq!(kernels.iter().map(|k| k["head_dim"].as_u64().unwrap()).collect::<Vec<_>>(), [64, 128]);
        assert!(kernels.iter().all(|kernel| kernel["name"].as_str().unwrap().starts_with("forward_")));
    }
    let (people, _) = succeeds(&["devices"]);
    assert!(people.contains("cpu: ") && people.contains("default: "), "{people}");
    for (adapter, entry) in adapters.iter().zip(listed) {
        assert!(people.contains(&adapter.get_info().name), "{people}");
        let matrices = match entry["cooperative_error"].as_str() {
            Some(reason) => format!("matrices    none: {reason}\n"),
            None => format!("matrices    {}\n", Capabilities::of_adapter(adapter).cooperative.unwrap()),
        };
        assert!(people.contains(&matrices), "no {matrices:?} in {people}");
        let elements = match (entry["elements"].as_str(), entry["elements_error"].as_str()) {
            (Some(layout), _) => format!("elements    {layout}\n"),
            (None, reason) => format!("elements    none: {}\n", reason.unwrap()),
        };
        assert!(people.contains(&elements), "no {elements:?} in {people}");
        let bf16 = match (entry["bf16_rounding"].as_str(), entry["bf16_error"].as_str()) {
            (Some(rounding), _) => format!("bf16        on matrices as itself; f32 is {rounding}\n"),
            (None, reason) => format!("bf16        converted to f16 for matrices: {}\n", reason.unwrap()),
        };
        assert!(people.contains(&bf16), "no {bf16:?} in {people}");
        let spirv = match (entry["spirv"].as_str(), entry["spirv_error"].as_str()) {
            (Some(version), _) => format!("SPIR-V      {version}: "),
            (None, reason) => format!("SPIR-V      no, so that tiles have no hints for loops: {}\n", reason.unwrap()),
        };
        assert!(people.contains(&spirv), "no {spirv:?} in {people}");
    }
}

/// What `devices` and `plan` say of an adapter is what a device of it turns out to offer.
#[test]
fn capabilities_are_known_before_a_device_is_opened() {
    for adapter in adapters() {
        if let Ok(device) = Device::open(&adapter) {
            let mut known = Capabilities::of_adapter(&adapter);
            let bf16 = CooperativeMatrices::bf16_of_adapter(&adapter).ok();
            known.cooperative =
                known.cooperative.map(|c| c.elements(ElementLayout::of_adapter(&adapter).ok()).bf16(bf16));
            assert_eq!(known, *device.capabilities());
        }
    }
}

#[test]
fn devices_says_what_the_environment_variable_changes() {
    for (value, adapter, phrase) in [
        ("cpu", Value::Null, "default: cpu (SINK_ATTENTION_ADAPTER=cpu)"),
        ("no such adapter", Value::Null, "default: none, no adapter matches \"no such adapter\""),
    ] {
        let run = |arguments: &[&str]| command(arguments).env(ADAPTER_VARIABLE, value).output().unwrap();
        let people = run(&["devices"]);
        assert_eq!(people.status.code(), Some(0));
        assert!(text(&people.stdout).contains(phrase), "{}", text(&people.stdout));
        let list: Value = serde_json::from_slice(&run(&["devices", "--json"]).stdout).unwrap();
        assert_eq!((&list["default"]["variable"], &list["default"]["adapter"]), (&json!(value), &adapter));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn without_an_adapter() {
    let devices = without_adapters(&["devices"]);
    assert_eq!(devices.status.code(), Some(0));
    assert!(text(&devices.stdout).starts_with("No GPU adapter found"), "{}", text(&devices.stdout));
    let list: Value = serde_json::from_slice(&without_adapters(&["devices", "--json"]).stdout).unwrap();
    assert_eq!((&list["adapters"], &list["default"]["adapter"]), (&json!([]), &Value::Null));
    assert!(list["cpu_threads"].as_u64().unwrap() > 0);

    for arguments in [["check", "--backend", "gpu"], ["plan", "--backend", "gpu"]] {
        let output = without_adapters(&arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("no GPU adapter found"), "{}", text(&output.stderr));
    }
    let plan = without_adapters(&["plan"]);
    assert!(text(&plan.stdout).contains("the CPU path"), "{}", text(&plan.stdout));
}

#[test]
fn plan_explains() {
    let arguments = ["plan", "--device", "h200", "--causal", "--seq-k", "4096", "--sinks", "per-head"];
    let (people, _) = succeeds(&arguments);
    let words = ["NVIDIA H200 (sample)", "B=1 H=32 G=8 M=4096 N=4096 D=64 E=64 bshd causal sink_logits", "50.0 %"];
    for word in words.into_iter().chain(["forward_portable", "workgroup", "visits", "sink_logits 128 B"]) {
        assert!(people.contains(word), "no {word:?} in\n{people}");
    }
    let plan = json_of(&arguments);
    assert_eq!(plan["visible_pairs"], 4096 * 4097 / 2);
    assert_eq!(plan["flops"], 2.0 * 32.0 * 128.0 * (4096.0 * 4097.0 / 2.0));
    let launch = &plan["launches"][0];
    let number = |key: &str| launch["tiles"][key].as_u64().unwrap();
    assert_eq!(launch["workgroups"].as_u64().unwrap(), 32 * 4096 / number("rows"));
    assert!(number("masked") < number("visited"));
    assert!(number("visited") < number("all"));
    assert!(launch["workgroup_bytes"].as_u64().unwrap() <= launch["workgroup_bytes_offered"].as_u64().unwrap());
    // Devices of Mesa's compilers, by their short names in any case; registers fit those of the class.
    for (device, name, kernel) in [
        ("M1", "Apple M1 (Honeykrisp)", "portable"),
        ("rx7900XTX", "AMD Radeon RX 7900 XTX (RADV NAVI31)", "cooperative"),
        ("rx9070xt", "AMD Radeon RX 9070 XT (RADV GFX1201)", "cooperative"),
        ("rx6800", "AMD Radeon RX 6800 (RADV NAVI21)", "portable"),
        ("adreno740", "Adreno 740 (Turnip)", "portable"),
        ("Adreno830", "Adreno 830 (Turnip)", "portable"),
        ("turing", "NVIDIA Turing (NVK)", "cooperative"),
        ("ampere", "NVIDIA Ampere (NVK)", "cooperative"),
    ] {
        let arguments = ["plan", "--device", device, "--causal", "--dtype", "f16", "--backward"];
        let (people, _) = succeeds(&arguments);
        assert!(people.contains(name), "no {name:?} in\n{people}");
        let plan = json_of(&arguments);
        let launches: Vec<_> = plan["launches"].as_array().unwrap().iter().filter(|l| l["tiles"].is_object()).collect();
        assert!(launches.iter().any(|launch| launch["kernel"].as_str().unwrap().contains(kernel)), "{device}: {plan}");
        for launch in launches {
            let number = |key: &str| launch["tiles"][key].as_u64().unwrap();
            // The estimate for fragments is a rough one.
            let fits = number("registers") <= number("registers_offered")
                || !launch["kernel"].as_str().unwrap().contains("portable");
            assert!(fits && number("subgroups") > 0, "{device}: {launch}");
        }
    }
}

#[test]
fn plan_takes_every_option() {
    for (arguments, phrase) in [
        (&["--batch", "2", "--heads", "6"][..], "B=2 H=6 G=6 M=8192"),
        (&["--kv-heads", "1", "--seq-q", "1"], "G=1 M=1 N=8192"),
        (&["--head-dim", "192", "--value-dim", "128"], "D=192 E=128"),
        (&["--head-dim", "80"], "D=80 E=80"),
        (&["--head-dim", "33"], "one by one"),
        (&["--window", "128", "--sink-tokens", "4"], "window=(127,0) sink_tokens=4"),
        (&["--window-left", "3"], "window=(3,-)"),
        (&["--window-right", "0"], "window=(-,0)"),
        (&["--sinks", "off-by-one"], "off-by-one"),
        (&["--layout", "bhsd"], "bhsd"),
        (&["--dtype", "f16"], "bshd f16"),
        (&["--dtype", "bf16"], "forward_portable_bf16_d64"),
        (&["--kernel", "portable"], "forward_portable_f32_d64"),
        (&["--align", "top-left"], "top-left"),
        (&["--q-offset", "-5"], "query_offset=-5"),
        (&["--scale", "-0.5"], "scale=-0.5"),
    ] {
        let (people, _) = succeeds(&[&["plan", "--device", "a770"], arguments].concat());
        assert!(people.contains(phrase), "no {phrase:?} in\n{people}");
    }
}

/// Operands take half the bytes, what goes with the softmax as many.
#[test]
fn plan_in_half_precision() {
    let sizes = |dtype| {
        let arguments = ["plan", "--device", "M2", "--backward", "--sinks", "per-head", "--head-dim", "63", "--dtype"];
        let plan = json_of(&[&arguments[..], &[dtype]].concat());
        assert_eq!(plan["dtype"], dtype);
        let operands = plan["operands"].as_array().unwrap().clone();
        operands.into_iter().map(|o| (o["name"].as_str().unwrap().to_string(), o["bytes"].as_u64().unwrap())).collect()
    };
    let single: Vec<(String, u64)> = sizes("f32");
    for dtype in ["f16", "bf16"] {
        let half: Vec<(String, u64)> = sizes(dtype);
        for (name, bytes) in &single {
            let expected = match name.as_str() {
                "lse" | "sink_logits" | "d_sink_logits" | "delta" | "sink_partials" => Some(*bytes),
                _ => Some(bytes / 2),
            };
            let actual = half.iter().find(|(other, _)| other == name).map(|(_, bytes)| *bytes);
            assert_eq!(actual, expected, "{name} in {dtype}");
        }
    }
}

/// Counting tiles must not take a visit to each.
#[test]
fn plan_of_a_very_long_sequence() {
    let sequence = (1u64 << 27).to_string();
    let shape = ["--heads", "1", "--seq-k", &sequence, "--head-dim", "2"];
    let plan = json_of(&[&["plan", "--device", "7900", "--window", "1024"], &shape[..]].concat());
    assert_eq!(plan["visible_pairs"], (1u64 << 27) * 1024 - 1024 * 1023 / 2);
}

#[test]
fn plan_for_the_cpu_and_for_what_is_here() {
    assert_eq!(json_of(&["plan", "--backend", "cpu"])["launches"], Value::Array(Vec::new()));
    let here = json_of(&["plan"]);
    assert!(here["device"].is_string());
    if gpu().is_some() {
        assert!(json_of(&["plan", "--backend", "gpu"])["launches"][0]["kernel"].is_string());
    }
}

#[test]
fn unfit_plans_are_errors() {
    for (arguments, message) in [
        (&["--device", "Voodoo2"][..], "no device matches \"Voodoo2\"; known: NVIDIA H200, "),
        (&["--device", "H200", "--heads", "5", "--kv-heads", "2"], "heads (5) must be a multiple of kv_heads (2)"),
        (&["--device", "H200", "--seq-q", "1", "--seq-k", "0"], "seq_k is 0"),
        (&["--device", "H200", "--seq-q", "0"], "seq_q is 0"),
        (&["--device", "H200", "--head-dim", "513"], "head_dim is 513, the most is 512"),
        (&["--device", "H200", "--scale", "inf"], "option scale"),
        (&["--device", "H200", "--batch", "999999999999"], "batch is 999999999999"),
        (&["--device", "H200", "--batch", "1000"], "q needs a buffer of 67108864000 bytes"),
        (&["--device", "WebGPU defaults", "--seq-k", "40000"], "q needs a buffer of 327680000 bytes"),
        (
            &[
                "--device",
                "WebGPU defaults",
                "--heads",
                "8",
                "--kv-heads",
                "8",
                "--seq-k",
                "70000",
                "--head-dim",
                "100",
            ],
            // All keys of a head, between those of others.
            "the smallest piece of the work needs a binding of k of 223997200 bytes, the device offers 134217728",
        ),
        (&["--device", "WebGPU defaults", "--seq-k", "30000"], ""),
        (&["--device", "WebGPU", "--batch", "200000", "--seq-k", "1", "--head-dim", "1"], ""),
    ] {
        let arguments = [&["plan"], arguments].concat();
        if message.is_empty() {
            // Many small workgroups are folded, and what exceeds a binding is cut, not refused.
            succeeds(&arguments);
        } else {
            let stderr = fails(&arguments);
            assert!(stderr.contains(message), "no {message:?} in {stderr}");
        }
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    wrong_usage(&["plan", "--window", "0"], "at least the query's own key");
    wrong_usage(&["plan", "--window", "5", "--window-left", "3"], "cannot be used with");
    wrong_usage(&["plan", "--device", "H200", "--backend", "gpu"], "cannot be used with");
    wrong_usage(&["plan", "--sinks", "two"], "off-by-one");
    wrong_usage(&["plan", "--heads", "many"], "--heads");
    wrong_usage(&["check", "--backend", "cpu", "--adapter", "0"], "cannot be used with");
    wrong_usage(&["check", "--seed", "x"], "--seed");
    wrong_usage(&["devices", "--adapter", "0"], "--adapter");
}

#[test]
fn check_on_the_cpu() {
    let (people, stderr) = succeeds(&["check", "--quick", "--backend", "cpu", "--dtype", "f32"]);
    assert!(people.starts_with("device   CPU (") && people.trim_end().ends_with("all passed"), "{people}");
    assert_eq!(stderr, "", "progress is for terminals");
    let report = json_of(&["check", "--quick", "--backend", "cpu", "--seed", "7"]);
    assert_eq!((&report["failed"], &report["seed"], &report["failures"]), (&json!(0), &json!(7), &json!([])));
    let dtypes = report["dtypes"].as_array().unwrap();
    assert_eq!(dtypes.iter().map(|found| found["dtype"].as_str().unwrap()).collect::<Vec<_>>(), ["f32", "f16", "bf16"]);
    assert_eq!(dtypes.iter().map(|found| found["cases"].as_u64().unwrap()).sum::<u64>(), report["cases"]);
    for found in dtypes {
        let groups = found["groups"].as_array().unwrap();
        assert_eq!(groups.iter().map(|group| group["cases"].as_u64().unwrap()).sum::<u64>(), found["cases"]);
        for group in groups {
            for column in ["o", "lse", "d_q", "d_k", "d_v"] {
                let error = group["errors"][column].as_f64().unwrap();
                assert!(error <= found["bounds"][column].as_f64().unwrap(), "{group}");
            }
            // Where there are sink logits, and no number is no success.
            let sinks = group["name"].as_str().unwrap().contains("sink logits");
            assert!(!sinks || group["errors"]["d_sink"].is_number(), "{group}");
            assert!(group["errors"].as_object().unwrap().values().all(Value::is_number), "{group}");
        }
        assert_eq!(found["worst"].as_array().unwrap().len(), 8);
        // Results in half precision are rounded, all else is not.
        let half = found["dtype"] != "f32";
        let worst = |n: usize| found["worst"][n]["error"].as_f64().unwrap();
        assert!((worst(0) > 1e-4) == half && worst(1) < 1e-5 && worst(5) < 1e-5, "{found}");
    }
    assert_eq!(report["pass"], "forward and backward");
}

#[test]
fn check_of_one_element_type() {
    for dtype in ["f32", "f16", "bf16"] {
        let report = json_of(&["check", "--backend", "cpu", "--only", "scale", "--dtype", dtype]);
        let found = report["dtypes"].as_array().unwrap();
        assert!(found.len() == 1 && found[0]["dtype"] == dtype, "{report}");
    }
    wrong_usage(&["check", "--dtype", "f64"], "f64");
}

#[test]
fn check_of_the_forward_pass() {
    let arguments = ["check", "--quick", "--backend", "cpu", "--dtype", "f32", "--forward"];
    let report = json_of(&arguments);
    assert_eq!((&report["pass"], &report["failed"]), (&json!("forward"), &json!(0)));
    assert_eq!(report["dtypes"][0]["worst"].as_array().unwrap().len(), 2);
    assert!(!succeeds(&arguments).0.contains("d_q"));
}

#[test]
fn the_table_of_a_check_fits_a_terminal() {
    let (people, _) = succeeds(&["check", "--backend", "cpu", "--only", "scale"]);
    let table = people.lines().skip_while(|line| !line.starts_with("group")).take_while(|line| !line.is_empty());
    let widths: Vec<usize> = table.map(|line| line.chars().count()).collect();
    assert!(widths.len() == 3 && widths.iter().all(|&width| width <= 100), "{people}");
}

#[test]
fn check_on_the_gpu() {
    if gpu().is_some() {
        // It is the command that is tested here, kernels are in other suites: a group in one type.
        let few: &[&str] = if all_cases() { &[] } else { &["--dtype", "f32", "--only", "heads, batch, layout"] };
        let report = json_of(&[&["check", "--quick", "--backend", "gpu"], few].concat());
        assert_eq!(report["failed"], 0, "{report}");
        assert_eq!(report["device"]["gpu"], true);
    }
}

#[test]
fn check_repeats_a_case() {
    let whole = json_of(&["check", "--quick", "--backend", "cpu"]);
    for found in whole["dtypes"].as_array().unwrap() {
        for worst in found["worst"].as_array().unwrap() {
            let case = worst["case"].as_str().unwrap();
            let one = json_of(&["check", "--backend", "cpu", "--only", case]);
            let again = one["dtypes"].as_array().unwrap();
            assert!(again.len() == 1 && again[0]["dtype"] == found["dtype"], "{one}");
            let of_column = again[0]["worst"].as_array().unwrap().iter().find(|w| w["column"] == worst["column"]);
            assert_eq!(of_column.unwrap()["error"], worst["error"]);
        }
    }
    let scale = json_of(&["check", "--backend", "cpu", "--only", "scale"]);
    let dtypes = scale["dtypes"].as_array().unwrap();
    assert!(dtypes.len() == 3 && dtypes.iter().all(|found| found["groups"].as_array().unwrap().len() == 1), "{scale}");
    let stderr = fails(&["check", "--backend", "cpu", "--only", "no such case"]);
    assert!(stderr.contains("no case matches"), "nothing checked is no success: {stderr}");
}

#[test]
fn help_is_there() {
    for (command, words) in [
        ("devices", ["--json", "SINK_ATTENTION_ADAPTER"]),
        ("plan", ["--window-left", "--device"]),
        ("check", ["--quick", "--dtype"]),
    ] {
        let help = sink_attention(&[command, "--help"]);
        assert_eq!(help.status.code(), Some(0));
        assert!(words.iter().all(|word| text(&help.stdout).contains(word)), "{}", text(&help.stdout));
    }
}
