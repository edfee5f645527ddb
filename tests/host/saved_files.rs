//! Files under hard use: many writers of one path, processes that are killed, endless files, and files of versions before.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::saved::{CONTIGUOUS, EarlierCache, each_earlier_cache, filled_cache, of, saved};
use sink_attention::cache::CacheKind;
use sink_attention::plan::{Kernel, LoopHints, PortableTile, Tiling};
use sink_attention::testing::folder::Folder;
use sink_attention::tuning::{MaskClass, Tuning, TuningKey};
use sink_attention::{DType, Element, Error, cpu, file};

fn folder(test: &str) -> Folder {
    Folder::new(env!("CARGO_TARGET_TMPDIR"), test)
}

struct OnTheCpu;

impl EarlierCache for OnTheCpu {
    /// The file loads, and is what the cache saves again.
    fn check<T: Element>(&self, name: &str, expected: &cpu::KvCache<T>) {
        let (path, bytes) = (saved(name), fs::read(saved(name)).unwrap());
        let mut cache = cpu::KvCache::<T>::new(expected.config()).unwrap();
        cache.load(&path).unwrap();
        assert_eq!(cache.lengths(), expected.lengths());
        assert!(cache.to_safetensors().unwrap() == bytes && expected.to_safetensors().unwrap() == bytes, "{name}");
        // One of a version to come is told by it.
        let mut later = bytes;
        let at = later.windows(10).position(|bytes| bytes == b"version=1 ").unwrap();
        later[at + 8] = b'2';
        let error = cache.restore(&later).unwrap_err();
        assert_eq!(error.to_string(), "the saved cache has version 2, wanted is 1");
    }
}

#[test]
fn caches_of_earlier_versions_load() {
    each_earlier_cache(&OnTheCpu);
}

#[test]
fn tunings_of_earlier_versions_load() {
    let tuning = Tuning::load(saved("some_gpu.tuning")).unwrap();
    let mut expected = Tuning::new("Some GPU", "1.2 (Mesa)");
    let tiles =
        PortableTile { threads_r: 16, threads_c: 8, rows: 4, quads: 1, k_step: 8, n_step: 16, loops: LoopHints::NONE };
    let key = |kernel, dtype, width, mask| TuningKey { kernel, dtype, width, mask };
    expected.insert(key(Kernel::FORWARD, DType::F32, 64, MaskClass::Long), tiles);
    let cooperative = Tiling::Cooperative { subgroups: 4, rows: 3, columns: 1, stages: 2, loops: LoopHints::NONE };
    expected.insert(key(Kernel::D_Q, DType::F16, 128, MaskClass::Window), cooperative);
    assert_eq!(tuning, expected);
}

/// Two caches of one config whose files differ in length.
fn two_caches() -> [cpu::KvCache<f32>; 2] {
    let config = of::<f32>(CacheKind::Contiguous { capacity: 400 }, 64);
    let small = filled_cache::<f32>(&config);
    let mut large = filled_cache::<f32>(&config);
    let k = vec![0.5; 2 * 300 * config.kv_heads * config.head_dim];
    large.append(&[300, 300], &k, &k[..2 * 300 * config.kv_heads * config.value_dim], None, None).unwrap();
    [small, large]
}

/// Loads the path: it is one of the two.
#[track_caller]
fn loads_one_of(path: &Path, caches: &[cpu::KvCache<f32>; 2]) {
    let mut loaded = cpu::KvCache::<f32>::new(caches[0].config()).unwrap();
    loaded.load(path).unwrap();
    assert!(caches.iter().any(|cache| cache.lengths() == loaded.lengths()), "{:?}", loaded.lengths());
}

/// Elsewhere a file cannot be replaced while another thread or process has it open: a save is an error then.
#[cfg(unix)]
#[test]
fn threads_save_to_one_path_while_another_loads_it() {
    let folder = folder("saved-threads");
    let (path, caches, done) = (folder.path("cache"), two_caches(), AtomicBool::new(false));
    caches[0].save(&path).unwrap();
    std::thread::scope(|scope| {
        let savers: Vec<_> = (0..8)
            .map(|n| {
                let (path, caches) = (&path, &caches);
                scope.spawn(move || (0..20).for_each(|turn| caches[(n + turn) % 2].save(path).unwrap()))
            })
            .collect();
        let loader = scope.spawn(|| {
            let mut loads = 0;
            while !done.load(Ordering::Relaxed) {
                loads_one_of(path.as_ref(), &caches);
                loads += 1;
            }
            loads
        });
        let results: Vec<_> = savers.into_iter().map(|saver| saver.join()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(results.iter().all(Result::is_ok), "a save failed");
        assert!(loader.join().unwrap() > 0);
    });
    assert_eq!(folder.names(), ["cache"], "nothing is left beside it");
}

#[cfg(unix)]
mod processes {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    /// The variable that names the path.
    const PATH: &str = "SAVED_FILES_TEST_PATH";

    #[test]
    #[ignore = "others run it in processes of its own"]
    fn saves_until_it_is_killed() {
        let Some(path) = std::env::var_os(PATH) else { return };
        let caches = two_caches();
        println!("saving");
        for turn in 0.. {
            caches[turn % 2].save(&path).unwrap();
        }
    }

    /// This program, which saves to the path, and does so when this returns.
    fn saver(path: &str) -> Child {
        // By its name: where a loader runs it, the current executable is the loader.
        let mut command = Command::new(std::env::args_os().next().unwrap());
        command.args(["--exact", "saved_files::processes::saves_until_it_is_killed", "--ignored", "--nocapture"]);
        let mut child = command.env(PATH, path).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("saving")), "it does not save");
        child
    }

    /// Two hundred of them, eight at a time, which save to one path.
    #[test]
    fn a_killed_process_leaves_a_whole_file() {
        let folder = folder("saved-kills");
        let (path, caches) = (folder.path("cache"), two_caches());
        caches[0].save(&path).unwrap();
        let mut rng = StdRng::seed_from_u64(13);
        for _ in 0..25 {
            let savers: Vec<Child> = (0..8).map(|_| saver(&path)).collect();
            for mut saver in savers {
                std::thread::sleep(Duration::from_micros(rng.random_range(0..3000)));
                // All of them are at it until this one is killed.
                assert!(saver.try_wait().unwrap().is_none(), "a save failed");
                saver.kill().unwrap();
                saver.wait().unwrap();
                loads_one_of(path.as_ref(), &caches);
            }
        }
        let mut left = folder.names();
        left.retain(|name| name != "cache");
        let is_temporary = |name: &String| name.starts_with(".sink-attention-") && name.ends_with(".tmp");
        assert!(left.iter().all(is_temporary), "{left:?}");
        // Else no kill had come in the middle of a save.
        assert!(!left.is_empty() && left.len() <= 200, "{} of 200 left a temporary file", left.len());
        caches[1].save(&path).unwrap();
        loads_one_of(path.as_ref(), &caches);
    }
}

#[cfg(unix)]
#[test]
fn modes_and_links_are_kept() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    let folder = folder("saved-modes");
    let mode = |name: &str| fs::metadata(folder.path(name)).unwrap().permissions().mode() & 0o7777;
    let [plain, new, link, dangling] = ["plain", "new", "link", "dangling"].map(|name| folder.path(name));
    fs::write(&plain, "plain").unwrap();
    file::replace(&new, b"new").unwrap();
    assert_eq!(mode("new"), mode("plain"), "as of a plain create");
    for kept in [0o600, 0o640, 0o755] {
        fs::set_permissions(&new, fs::Permissions::from_mode(kept)).unwrap();
        file::replace(&new, b"newer").unwrap();
        assert_eq!((mode("new"), fs::read(&new).unwrap()), (kept, b"newer".to_vec()));
    }
    fs::create_dir(folder.path("other")).unwrap();
    symlink("other/target", &link).unwrap();
    symlink("link", &dangling).unwrap();
    for content in ["first", "second"] {
        file::replace(&dangling, content.as_bytes()).unwrap();
        assert_eq!(fs::read(folder.path("other/target")).unwrap(), content.as_bytes());
        assert!(
            fs::symlink_metadata(&link).unwrap().is_symlink() && fs::read_link(&dangling).unwrap() == Path::new("link")
        );
    }
    symlink("round", folder.path("round")).unwrap();
    let error = file::replace(folder.path("round"), b"").unwrap_err();
    assert!(error.to_string().contains("more than 40 symbolic links"), "{error}");
    assert_eq!(folder.names(), ["dangling", "link", "new", "other", "plain", "round"]);
    assert_eq!(fs::read_dir(folder.path("other")).unwrap().count(), 1);
}

#[test]
fn what_cannot_be_written_is_told_before_and_leaves_nothing() {
    let folder = folder("saved-refused");
    let there = folder.write("there", b"earlier");
    file::check_writable(&there).unwrap();
    file::check_writable(folder.path("new")).unwrap();
    for (path, reason) in [
        (folder.path("no/such/folder"), ""),
        (folder.path("there/below"), ""),
        (folder.path("."), "not a regular file"),
        (folder.path(&"x".repeat(300)), ""),
    ] {
        let [asked, tried] = [file::check_writable(&path), file::replace(&path, b"new")].map(Result::unwrap_err);
        assert_eq!(asked.to_string(), tried.to_string(), "{path}");
        assert!(asked.to_string().contains(reason), "{path}: {asked}");
    }
    assert_eq!((folder.names(), fs::read(&there).unwrap()), (vec!["there".to_string()], b"earlier".to_vec()));
}

/// Nothing of these is read: not the zeros of a device, nor those of a file with a hole as large as the disk.
#[cfg(unix)]
#[test]
fn endless_files_are_refused() {
    let folder = folder("saved-endless");
    let (huge, pipe) = (folder.path("huge"), folder.path("pipe"));
    fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let cache = || cpu::KvCache::<f32>::new(&of::<f32>(CONTIGUOUS, 8)).unwrap();
    for path in ["/dev/zero", &pipe] {
        for error in [Tuning::load(path).unwrap_err(), cache().load(path).unwrap_err(), cache().save(path).unwrap_err()]
        {
            assert!(error.to_string().contains("it is not a regular file"), "{error}");
        }
    }
    let error = Tuning::load(&huge).unwrap_err().to_string();
    assert!(error.contains("it has 1099511627776 bytes, the most is 16777216"), "{error}");
    let error = cache().load(&huge).unwrap_err();
    assert!(matches!(&error, Error::SavedFile { .. }) && error.to_string().contains("the header: "), "{error}");
}
