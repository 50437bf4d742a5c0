//! Arenas as files: made, refused, opened, left behind.

mod common;

use common::{Process, decode_step, facts, folder, publisher, role, say, stay};
use expert_lens_arena::{Error, Facts, LAYOUT_VERSION, MAX_LAYERS, Mode, OnFull, Publisher, find, list, open};
use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const SIZE: usize = 1 << 20;

fn create(directory: &Path, capture: &str, bytes: usize) -> Result<Publisher, Error> {
    Publisher::create(directory, capture, bytes, &facts(8, false), OnFull::Drop)
}

fn refusal<T>(result: Result<T, Error>) -> Error {
    result.err().expect("an error")
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// Overwrite one 64-bit word of a file.
fn poke(path: &Path, word: u64, value: u64) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(&value.to_ne_bytes(), word * 8).unwrap();
}

#[test]
fn an_arena_is_its_owners_alone_and_its_space_is_reserved() {
    let root = folder();
    let directory = root.path().join("captures");
    let publisher = create(&directory, "a", SIZE + 5).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join("a")), 0o700);
    assert_eq!(publisher.path(), directory.join("a/0.arena"));
    assert_eq!(mode(publisher.path()), 0o600);
    let file = fs::metadata(publisher.path()).unwrap();
    assert_eq!(file.len(), SIZE as u64);
    assert!(file.blocks() * 512 >= SIZE as u64, "{} blocks are reserved", file.blocks());
    assert_eq!(fs::read_dir(directory.join("a")).unwrap().count(), 1, "nothing unfinished is left");
}

#[test]
fn an_arena_says_what_it_was_made_with() {
    let root = folder();
    let long = "mödel ".repeat(100);
    let facts = Facts {
        layers: (0..MAX_LAYERS as u16).collect(),
        num_experts: 384,
        top_k: 8,
        weights: true,
        kv_slots: 77,
        rank: 3,
        other_stages: 1,
        engine: "engine".into(),
        engine_version: String::new(),
        model: long.clone(),
    };
    let publisher = Publisher::create(root.path(), "a", 4 << 20, &facts, OnFull::Drop).unwrap();
    assert_eq!(publisher.path(), root.path().join("a/3.arena"));
    let reader = open(publisher.path(), Mode::Lossy).unwrap();
    let model = reader.facts().model.clone();
    assert!(model.len() > 250 && long.starts_with(&model), "a long name is cut, at a character's end: {model}");
    assert_eq!(*reader.facts(), Facts { model, ..facts });
    assert_eq!(reader.header().producer.pid, std::process::id());
    let captures = list(root.path()).unwrap();
    assert_eq!(captures.len(), 1);
    assert_eq!((captures[0].name.as_str(), captures[0].bytes, captures[0].alive), ("a", 4 << 20, true));
}

#[test]
fn the_end_in_good_order_leaves_nothing() {
    let root = folder();
    drop(create(root.path(), "a", SIZE).unwrap());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn facts_and_sizes_outside_the_limits_are_refused_and_leave_nothing() {
    let root = folder();
    let refuse = |facts: &Facts, bytes, words: &str| {
        let error = refusal(Publisher::create(root.path(), "a", bytes, facts, OnFull::Drop));
        assert!(matches!(error, Error::Invalid { .. }) && error.to_string().contains(words), "{error}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    };
    refuse(&facts(8, false), 1000, "give it 65536 or more");
    refuse(&Facts { layers: vec![], ..facts(8, false) }, SIZE, "0 routed layers");
    refuse(&Facts { layers: vec![0; 513], ..facts(8, false) }, SIZE, "513 routed layers");
    refuse(&facts(0, false), SIZE, "0 experts");
    refuse(&facts(65_537, false), SIZE, "65537 experts");
    refuse(&Facts { top_k: 9, ..facts(8, false) }, SIZE, "top-k is 9");
    let wide = Facts { layers: vec![0; 512], num_experts: 65_536, top_k: 64, ..Facts::default() };
    refuse(&wide, SIZE, "too small for rows of");
    // The size that the message names does.
    let error = refusal(Publisher::create(root.path(), "a", SIZE, &wide, OnFull::Drop)).to_string();
    let least: usize = error.rsplit("about ").next().unwrap().trim_end_matches(" bytes").parse().unwrap();
    Publisher::create(root.path(), "a", least + 8192, &wide, OnFull::Drop).unwrap();
}

#[test]
fn names_that_are_no_plain_folder_names_are_refused() {
    let root = folder();
    for name in ["", ".", "..", ".hidden", "a/b", "a\0b", "ä", &"x".repeat(65)] {
        assert!(matches!(refusal(create(root.path(), name, SIZE)), Error::Invalid { .. }), "{name:?}");
        assert!(matches!(refusal(find(root.path(), name)), Error::Invalid { .. }), "{name:?}");
    }
    create(root.path(), &"x".repeat(64), SIZE).unwrap();
}

#[test]
fn too_large_an_arena_is_an_error_that_says_what_to_do() {
    let root = folder();
    let error = refusal(create(root.path(), "a", 1 << 50));
    let Error::NoSpace { needed, free, .. } = &error else { panic!("{error}") };
    assert_eq!(*needed, 1 << 50);
    assert!(*free > 0);
    let message = error.to_string();
    for part in [&needed.to_string(), &free.to_string(), "a smaller arena", "--shm-size", "EXPERT_LENS_DIR"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(matches!(refusal(create(root.path(), "a", usize::MAX)), Error::NoSpace { .. }));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

/// A tmpfs of a given size, where we may mount one.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(size: &str) -> Option<Self> {
        let mount = Self(folder());
        let options = format!("size={size},mode=0700");
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(mount.0.path());
        command.status().is_ok_and(|status| status.success()).then_some(mount)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_file_system_is_an_error_now_and_never_a_bus_error_later() {
    let Some(mount) = Mount::new("1m") else {
        eprintln!("skipped: no right to mount a tmpfs");
        return;
    };
    let first = create(mount.0.path(), "a", 700 << 10).unwrap();
    let error = refusal(create(mount.0.path(), "b", 700 << 10));
    let Error::NoSpace { needed, free, .. } = error else { panic!("{error}") };
    assert_eq!(needed, 700 << 10);
    assert!(free < needed, "{free} are free");
    assert!(!mount.0.path().join("b").exists());
    // The one that fitted can be written to its last byte.
    let mut first = first;
    (0..20_000).for_each(|position| assert_eq!(decode_step(&mut first, 1, position), 0));
}

#[test]
fn what_the_dead_left_makes_room_when_there_is_none() {
    let Some(mount) = Mount::new("1m") else {
        eprintln!("skipped: no right to mount a tmpfs");
        return;
    };
    let mut child = Process::start("publish", mount.0.path(), 0);
    child.hear();
    assert!(matches!(refusal(create(mount.0.path(), "b", 700 << 10)), Error::NoSpace { .. }));
    child.kill();
    assert_eq!(find(mount.0.path(), "child-0").unwrap().len(), 1, "the dead one's arena is still there");
    let _next = create(mount.0.path(), "b", 700 << 10).unwrap();
    assert!(matches!(find(mount.0.path(), "child-0"), Err(Error::CaptureNotFound { .. })));
}

#[test]
fn folders_and_files_open_to_others_are_refused() {
    let root = folder();
    let publisher = create(root.path(), "a", SIZE).unwrap();
    let file = publisher.path().to_owned();
    for path in [root.path(), &root.path().join("a"), &file] {
        let before = fs::metadata(path).unwrap().permissions();
        for mode in [0o750, 0o701, 0o777] {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
            for error in [
                find(root.path(), "a").and_then(|found| open(&found[0], Mode::Lossy)).err(),
                create(root.path(), "a", SIZE).err(),
            ] {
                let error = error.unwrap();
                assert!(matches!(error, Error::Permission { .. }), "{error}");
                assert!(error.to_string().contains(&format!("{mode:04o}")), "{error}");
            }
        }
        fs::set_permissions(path, before).unwrap();
    }
    open(&file, Mode::Lossy).unwrap();
}

#[test]
fn what_belongs_to_another_user_is_refused() {
    if !is_root() {
        eprintln!("skipped: only root can give a file away");
        return;
    }
    let root = folder();
    let publisher = create(root.path(), "a", SIZE).unwrap();
    for path in [root.path().to_owned(), root.path().join("a"), publisher.path().to_owned()] {
        chown(&path, Some(12_345), None).unwrap();
        let error = find(root.path(), "a").and_then(|found| open(&found[0], Mode::Lossy)).err().unwrap();
        assert!(matches!(&error, Error::Permission { .. }) && error.to_string().contains("user 12345"), "{error}");
        assert!(matches!(refusal(create(root.path(), "a", SIZE)), Error::Permission { .. }));
        chown(&path, Some(0), None).unwrap();
    }
}

#[test]
fn symbolic_links_and_other_things_are_refused() {
    let root = folder();
    let publisher = create(root.path(), "a", SIZE).unwrap();
    let is_refused = |error: Error| assert!(matches!(error, Error::Permission { .. }), "{error}");
    let link = root.path().join("a/1.arena");
    symlink(publisher.path(), &link).unwrap();
    is_refused(refusal(open(&link, Mode::Lossy)));
    let facts = Facts { rank: 1, ..facts(8, false) };
    is_refused(refusal(Publisher::create(root.path(), "a", SIZE, &facts, OnFull::Drop)));

    symlink(root.path().join("a"), root.path().join("b")).unwrap();
    is_refused(refusal(find(root.path(), "b")));
    is_refused(refusal(create(root.path(), "b", SIZE)));
    let other = folder();
    symlink(root.path(), other.path().join("link")).unwrap();
    is_refused(refusal(create(&other.path().join("link"), "a", SIZE)));

    let pipe = root.path().join("a/2.arena");
    assert!(std::process::Command::new("mkfifo").args(["-m", "600"]).arg(&pipe).status().unwrap().success());
    is_refused(refusal(open(&pipe, Mode::Lossy)));
    fs::write(root.path().join("c"), "").unwrap();
    is_refused(refusal(create(root.path(), "c", SIZE)));
}

#[test]
fn a_name_in_use_is_refused_and_a_rank_of_its_own_is_not() {
    let root = folder();
    let _publisher = create(root.path(), "a", SIZE).unwrap();
    let error = refusal(create(root.path(), "a", SIZE));
    assert!(matches!(&error, Error::CaptureInUse { rank: 0, .. }), "{error}");
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    let _second =
        Publisher::create(root.path(), "a", SIZE, &Facts { rank: 10, ..facts(8, false) }, OnFull::Drop).unwrap();
    let _third =
        Publisher::create(root.path(), "a", SIZE, &Facts { rank: 2, ..facts(8, false) }, OnFull::Drop).unwrap();
    let names: Vec<PathBuf> = ["0", "2", "10"].iter().map(|rank| root.path().join(format!("a/{rank}.arena"))).collect();
    assert_eq!(find(root.path(), "a").unwrap(), names, "ranks are in the order of their numbers");
}

#[test]
fn an_unknown_capture_is_an_error_that_names_the_known() {
    let root = folder();
    let error = find(root.path(), "b").unwrap_err();
    assert!(error.to_string().contains("no capture named 'b'") && error.to_string().contains("none"), "{error}");
    let _publisher = create(root.path(), "a", SIZE).unwrap();
    assert!(find(root.path(), "b").unwrap_err().to_string().contains("running captures: a"));
    assert!(matches!(find(&root.path().join("nowhere"), "b"), Err(Error::CaptureNotFound { .. })));
}

#[test]
fn a_dead_captures_name_is_free_and_at_most_two_dead_ones_are_kept() {
    let root = folder();
    for number in 0..4 {
        let mut child = Process::start("publish", root.path(), number);
        child.hear();
        let error = refusal(create(root.path(), &format!("child-{number}"), SIZE));
        assert!(matches!(error, Error::CaptureInUse { pid, .. } if pid == child.id()), "{error}");
        child.kill();
    }
    let names = || list(root.path()).unwrap().into_iter().map(|c| (c.name, c.alive)).collect::<Vec<_>>();
    let dead = |number| (format!("child-{number}"), false);
    // Each child removed, when it began, what was one too many by then.
    assert_eq!(names(), [dead(1), dead(2), dead(3)]);
    let next = create(root.path(), "child-2", SIZE).unwrap();
    assert_eq!(names(), [dead(1), ("child-2".into(), true), dead(3)]);
    let mut reader = open(next.path(), Mode::Lossy).unwrap();
    assert!(reader.poll().unwrap().is_none(), "the new arena takes the dead one's place");
    drop(next);
    let _next = create(root.path(), "new", SIZE).unwrap();
    assert_eq!(names(), [dead(1), dead(3), ("new".into(), true)]);
}

#[test]
fn dead_ranks_are_no_part_of_the_capture_that_takes_their_name() {
    let root = folder();
    let mut child = Process::start("publish", root.path(), 0);
    child.hear();
    child.kill();
    let _publisher =
        Publisher::create(root.path(), "child-0", SIZE, &Facts { rank: 5, ..facts(300, true) }, OnFull::Drop).unwrap();
    assert_eq!(find(root.path(), "child-0").unwrap(), [root.path().join("child-0/5.arena")]);
}

#[test]
fn what_a_creator_left_unfinished_is_removed() {
    let root = folder();
    let left = root.path().join("a");
    fs::create_dir(&left).unwrap();
    fs::set_permissions(&left, Permissions::from_mode(0o700)).unwrap();
    fs::write(left.join(".0.4242.unfinished"), vec![0; 4096]).unwrap();
    assert!(list(root.path()).unwrap().is_empty());
    let _publisher = create(root.path(), "b", SIZE).unwrap();
    assert!(!left.exists());
}

#[test]
fn the_end_of_a_publisher_leaves_anothers_file_alone() {
    let root = folder();
    let first = create(root.path(), "a", SIZE).unwrap();
    let path = first.path().to_owned();
    fs::remove_file(&path).unwrap();
    let second = create(root.path(), "a", SIZE).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn creators_at_once_get_one_arena_each_or_a_clear_error() {
    let root = folder();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| create(root.path(), "a", SIZE))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert!(results.iter().flat_map(|r| r.as_ref().err()).all(|e| matches!(e, Error::CaptureInUse { .. })));
}

#[test]
fn an_arena_of_another_layout_is_an_error_that_names_both() {
    let root = folder();
    let publisher = create(root.path(), "a", SIZE).unwrap();
    for found in [0, LAYOUT_VERSION + 1, u64::MAX] {
        poke(publisher.path(), 1, found);
        let error = refusal(open(publisher.path(), Mode::Lossy));
        assert!(matches!(&error, Error::Version { found: f, known: LAYOUT_VERSION, .. } if *f == found), "{error}");
        assert!(list(root.path()).unwrap().is_empty());
    }
    // Its process lives: the name is taken, whatever the layout.
    assert!(matches!(refusal(create(root.path(), "a", SIZE)), Error::CaptureInUse { .. }));
}

#[test]
fn every_kind_of_hostile_header_is_an_error() {
    let root = folder();
    let publisher = create(root.path(), "a", SIZE).unwrap();
    let path = publisher.path();
    let whole = fs::read(path).unwrap();
    let text = |word: u64| whole[word as usize * 8..][..8].to_owned();
    let not_utf8 = |word| {
        let mut bytes = text(word);
        bytes[0] = 7;
        bytes[1] = 0xff;
        u64::from_ne_bytes(bytes.try_into().unwrap())
    };
    let cases = [
        (0, 0, "is not an arena"),
        (0, u64::MAX, "is not an arena"),
        (2, 5, "its header says 5"),
        (2, u64::MAX, "its header says"),
        (3, 0, "0 descriptors"),
        (3, u64::MAX, "descriptors in the header"),
        (4, 0, "0 routed layers"),
        (4, 513, "513 routed layers"),
        (4, u64::MAX, "routed layers"),
        (5, 0, "0 experts"),
        (5, 65_537, "65537 experts"),
        (5, 1 << 32 | 8, "the number of experts is"),
        (6, 0, "top-k is 0"),
        (6, 9, "top-k is 9"),
        (6, 1 << 40, "top-k is"),
        (8, 1 << 32, "the rank is"),
        (9, 1 << 32, "the process id is"),
        (16, u64::MAX, "a name of 255 bytes"),
        (16, not_utf8(16), "not UTF-8"),
        (24, u64::MAX, "a name of 255 bytes"),
        (32, not_utf8(32), "not UTF-8"),
    ];
    for (word, value, words) in cases {
        let before = u64::from_ne_bytes(text(word).try_into().unwrap());
        poke(path, word, value);
        let error = refusal(open(path, Mode::Lossy));
        assert!(matches!(error, Error::Corrupt { .. }), "word {word} = {value:#x}: {error}");
        assert!(error.to_string().contains(words), "word {word} = {value:#x}: {error}");
        poke(path, word, before);
    }
    // Facts that are possible, but for a larger arena.
    poke(path, 4, 512);
    poke(path, 5, 65_536);
    poke(path, 6, 65_536);
    assert!(refusal(open(path, Mode::Lossy)).to_string().contains("too long for this arena"));
    // A tail past the head: no reader entry is left taken.
    fs::write(path, &whole).unwrap();
    for (head, tail) in [(0, 1), (5, u64::MAX), (u64::MAX, u64::MAX)] {
        poke(path, 256, head);
        poke(path, 264, tail);
        for _ in 0..70 {
            assert!(matches!(refusal(open(path, Mode::Lossless)), Error::Corrupt { .. }));
        }
    }
    poke(path, 256, 0);
    poke(path, 264, 0);
    open(path, Mode::Lossless).unwrap();
}

#[test]
fn files_cut_short_or_too_long_are_errors() {
    let root = folder();
    let publisher = create(root.path(), "a", SIZE).unwrap();
    let whole = fs::read(publisher.path()).unwrap();
    let path = root.path().join("a/1.arena");
    for len in [0, 1, 7, 8, 16, 4096, 65_535, 65_536, SIZE - 8, SIZE + 8] {
        let mut bytes = whole.clone();
        bytes.resize(len, 0);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let error = refusal(open(&path, Mode::Lossy));
        assert!(matches!(error, Error::Corrupt { .. }), "{len} bytes: {error}");
    }
    assert_eq!(list(root.path()).unwrap().len(), 1, "they are left out of the list");
}

#[test]
fn a_65th_reader_is_refused_until_another_leaves() {
    let root = folder();
    let publisher = publisher(root.path(), SIZE, &facts(8, false), OnFull::Drop);
    let mut readers: Vec<_> = (0..64).map(|_| open(publisher.path(), Mode::Lossy).unwrap()).collect();
    let error = refusal(open(publisher.path(), Mode::Lossy));
    assert!(matches!(error, Error::ReadersFull { count: 64 }), "{error}");
    readers.swap_remove(17);
    open(publisher.path(), Mode::Lossy).unwrap();
}

#[test]
#[ignore = "runs in child processes only"]
fn child() {
    let Some((role, folder, number)) = role() else { return };
    assert_eq!(role, "publish");
    let mut publisher = create(&folder, &format!("child-{number}"), 700 << 10).unwrap();
    decode_step(&mut publisher, 1, 0);
    say("published");
    stay();
}
