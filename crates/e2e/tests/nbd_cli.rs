//! `loam serve`, `copy`, `info` and `map` as their users meet them: what they print, how they end, what they leave.

mod nbd_serving;

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use loam_e2e::{Loam, Outcome, binary, tarball, wait_until};
use nbd_serving::{PATIENCE, Serving, extents, read_export, text, unix};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// A file of two megabytes: 64 KiB of noise at 0 and at 1 MiB, holes elsewhere.
fn sparse_file(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 2 << 20];
    for at in [0, 1 << 20] {
        bytes[at..at + 65536].copy_from_slice(&tarball::noise(at as u64 + 7, 65536));
    }
    let file = fs::File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for at in [0, 1 << 20] {
        file.write_all_at(&bytes[at..at + 65536], at as u64).unwrap();
    }
    bytes
}

#[test]
fn what_the_commands_print_has_the_promised_names() {
    let loam = Loam::new();
    let (disk, out, socket) = (loam.path("disk"), loam.path("out"), loam.path("s"));
    let bytes = sparse_file(&disk);
    let server = Serving::start(&loam, [&text(&disk), "--json", "--nbd", &unix(&socket)]);
    let ready: Value = serde_json::from_str(&server.line).unwrap();
    assert_eq!(ready["exports"][0]["size"], 2 << 20);
    assert_eq!(ready["pid"], server.child.id());
    let uri = ready["uri"].as_str().unwrap();
    assert_eq!(uri, format!("nbd+unix:///?socket={}", socket.display()));

    let copied = loam.run(["copy", uri, &text(&out), "--create", "--verify", "--json"]).json();
    assert_eq!((&copied["bytes"], &copied["data_bytes"]), (&(2 << 20).into(), &131_072.into()), "{copied}");
    assert_eq!(copied["zero_bytes"], (2 << 20) - 131_072);
    assert_eq!(copied["strategy"], "auto");
    assert!(copied["seconds"].as_f64().unwrap() > 0.0);
    for command in ["read", "write", "zero", "trim", "block_status"] {
        assert!(copied["commands"][command].is_u64(), "{command} in {copied}");
    }
    assert!(fs::read(&out).unwrap() == bytes);
    let rows = [
        (0, 65536, "data"),
        (65536, 983_040, "hole"),
        (1 << 20, 65536, "data"),
        (1_114_112, 983_040, "hole"),
    ];
    let rows = rows.map(|(offset, length, kind)| (offset, length, kind.to_owned()));
    for device in [uri, &text(&disk), &text(&out)] {
        assert_eq!(extents(&loam.run(["map", device, "--json"]).json()), rows, "{device}");
    }
    let info = loam.run(["info", uri, "--json"]).json();
    assert_eq!((&info["size"], &info["read_only"]), (&(2 << 20).into(), &false.into()));
    for name in ["minimum_block", "preferred_block", "maximum_block"] {
        assert!(info[name].is_u64(), "{name} in {info}");
    }
    assert_eq!(info["export"]["extended"], true);
    let contexts = info["export"]["contexts"].as_array().unwrap();
    assert!(contexts.contains(&"base:allocation".into()), "{info}");
    assert!(loam.run(["info", uri]).ok().contains("2 MiB (2097152 bytes)"));
    assert!(loam.run(["map", uri, "--locality"]).ok().contains("local"));
}

#[test]
fn several_exports_each_with_a_name_and_options_for_all() {
    let loam = Loam::new();
    let disk = loam.path("disk");
    let bytes = sparse_file(&disk);
    let server = Serving::start(
        &loam,
        [
            &format!("root={}", disk.display()),
            "swap=memory:1MiB",
            "--readonly",
            "--description",
            "two",
            "--nbd",
            "tcp:127.0.0.1:0",
        ],
    );
    let uris: Vec<&str> = server.line.split(' ').collect();
    assert_eq!(uris.len(), 2, "{uris:?}");
    assert!(uris[0].starts_with("nbd://127.0.0.1:") && uris[0].ends_with("/root"), "{uris:?}");
    assert!(!uris[0].contains(":0/") && uris[1].ends_with("/swap"), "{uris:?}");
    assert!(read_export(uris[0], 1 << 20, 65536).unwrap() == bytes[1 << 20..(1 << 20) + 65536]);
    let list = loam.run(["info", "--list", uris[0], "--json"]).json();
    let names: Vec<&str> =
        list["exports"].as_array().unwrap().iter().map(|export| export["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["root", "swap"]);
    assert_eq!(list["exports"][0]["description"], "two");
    assert_eq!(list["exports"][1]["read_only"], true);
    let refused = loam.run(["copy", "pattern:1MiB", uris[1]]).fails();
    assert!(refused.contains("read-only"), "{refused}");
    let unknown = loam.run(["info", &uris[0].replace("/root", "/boot")]).fails();
    assert!(unknown.contains("boot") && unknown.contains("--list"), "{unknown}");
}

#[test]
fn what_is_wrong_is_said_with_what_to_do() {
    let loam = Loam::new();
    let (disk, small) = (loam.path("disk"), loam.path("small"));
    sparse_file(&disk);
    fs::write(&small, [0; 4096]).unwrap();
    let code = |outcome: Outcome, code: i32| {
        assert_eq!(outcome.status.code(), Some(code), "{outcome:?}");
        outcome.fails()
    };
    for (arguments, expected) in [
        (&["serve", "a", "b"][..], "NAME=DEVICE"),
        (&["serve", "ramdisk:1G"], "file:ramdisk:1G"),
        (&["serve", "memory:1G", "--nbd", "udp:1"], "unix:PATH"),
        (&["serve", "memory:1G", "--layer", "slow"], "slow"),
        (&["serve", "memory:1G", "--tls", "on"], "--tls-certificates"),
        (&["copy", "memory:1G"], "DST"),
        (&["copy", "memory:1G", "null:1G", "--zero", "quick"], "prezero"),
        (&["copy", "memory:1K", "null:1K", "--queue-depth", "0"], "queue"),
        (&["info", "--list", "memory:1G"], "URI"),
        (&["map", "nbd+unix:///x"], "socket"),
        (&["map", "nbd+vsock://1"], "vsock"),
        (&["map", "pool:x"], "--pool"),
    ] {
        let said = code(loam.run(arguments), 2);
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    let disk = text(&disk);
    for (arguments, expected) in [
        (&["serve", "/nonexistent"][..], "/nonexistent"),
        (&["serve", "memory:1M", "--tls", "on", "--tls-certificates", "/nonexistent"], "server-cert.pem"),
        (&["copy", &disk, "/nonexistent/x"], "--create"),
        (&["copy", &disk, &text(&small)], "too small"),
        (&["copy", &disk, &disk], "itself"),
        (&["info", "nbd+unix:///?socket=/nonexistent"], "/nonexistent"),
        (&["map", "pool:"], "init"),
        (&["map", "index:/nonexistent.loam"], "/nonexistent.loam"),
    ] {
        let said = code(loam.run(arguments), 1);
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    assert_eq!(fs::read(&small).unwrap(), [0; 4096], "a refused copy writes nothing");
    for command in ["serve", "copy", "info", "map"] {
        let help = loam.run([command, "--help"]).ok();
        assert!(help.contains("Examples:") && help.contains("index:FILE"), "{help}");
    }
}

#[test]
fn a_pid_file_and_a_socket_are_there_while_the_server_is_and_sigterm_ends_it() {
    let loam = Loam::new();
    let (pid, socket) = (loam.path("pid"), loam.path("s"));
    let mut server =
        Serving::start(&loam, ["memory:1MiB", "--nbd", &unix(&socket), "--pid-file", &text(&pid)]);
    assert_eq!(fs::read_to_string(&pid).unwrap(), format!("{}\n", server.child.id()));
    assert!(socket.exists());
    let _idle = UnixStream::connect(&socket).unwrap();
    server.signal(Signal::TERM);
    assert_eq!(server.ended().code(), Some(0));
    assert!(!pid.exists() && !socket.exists());
}

#[test]
fn an_interrupt_waits_for_what_is_being_done_and_a_second_does_not() {
    let loam = Loam::new();
    let socket = loam.path("s");
    let arguments = |delay: &str| {
        [
            "memory:1MiB".to_owned(),
            "--layer".to_owned(),
            format!("delay,read={delay}"),
            "--nbd".to_owned(),
            unix(&socket),
        ]
    };
    let mut server = Serving::start(&loam, arguments("1s"));
    let uri = server.uri().to_owned();
    let reader = std::thread::spawn({
        let uri = uri.clone();
        move || read_export(&uri, 0, 4096)
    });
    std::thread::sleep(Duration::from_millis(400));
    server.signal(Signal::INT);
    assert_eq!(reader.join().unwrap().unwrap(), vec![0; 4096], "what was begun is finished");
    assert_eq!(server.ended().code(), Some(0));

    let mut server = Serving::start(&loam, arguments("60s"));
    let reader = std::thread::spawn(move || read_export(&uri, 0, 4096));
    std::thread::sleep(Duration::from_millis(300));
    let began = Instant::now();
    server.signal(Signal::INT);
    std::thread::sleep(Duration::from_millis(100));
    server.signal(Signal::INT);
    server.ended();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(!socket.exists());
    drop(server);
    // The client goes on trying to connect again until its patience ends.
    drop(reader);
}

#[test]
fn sockets_that_systemd_passes_are_used() {
    let loam = Loam::new();
    let socket = loam.path("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let script = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" serve pattern:1MiB";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(binary()).env("LOAM_POOL", loam.pool());
    command.stdin(Stdio::from(OwnedFd::from(listener)));
    let mut server = Serving::of(command);
    assert_eq!(server.uri(), format!("nbd+unix:///?socket={}", socket.display()));
    let bytes = read_export(server.uri(), 4096, 4096).unwrap();
    loam_block::PatternDevice::verify(4096, &bytes).unwrap();
    server.signal(Signal::TERM);
    assert_eq!(server.ended().code(), Some(0));
    assert!(socket.exists(), "the socket is systemd's");
}

#[test]
fn a_server_that_was_killed_starts_again_on_its_socket_and_a_living_one_keeps_it() {
    let loam = Loam::new();
    let (disk, socket) = (loam.path("disk"), loam.path("s"));
    let bytes = sparse_file(&disk);
    let arguments = [text(&disk), "--nbd".to_owned(), unix(&socket)];
    let mut server = Serving::start(&loam, &arguments);
    let refused = loam.run([&["serve".to_owned()][..], &arguments].concat()).fails();
    assert!(refused.contains("another server"), "{refused}");
    server.signal(Signal::KILL);
    server.ended();
    assert!(socket.exists(), "nobody removed it");
    let server = Serving::start(&loam, &arguments);
    assert!(read_export(server.uri(), 0, 65536).unwrap() == bytes[..65536]);
    fs::write(loam.path("file"), "precious").unwrap();
    let refused = loam.run(["serve", "memory:1M", "--nbd", &unix(&loam.path("file"))]).fails();
    assert!(refused.contains("file"), "{refused}");
    assert_eq!(fs::read_to_string(loam.path("file")).unwrap(), "precious");
}

#[test]
fn standard_input_and_output_are_one_connection() {
    let loam = Loam::new();
    for pipes in [false, true] {
        let mut command = loam.command(["serve", "--stdio", "pattern:1MiB"]);
        let greeting = if pipes {
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut greeting = [0; 16];
            child.stdout.as_mut().unwrap().read_exact(&mut greeting).unwrap();
            drop(child.stdin.take());
            wait_until("the server ends with its client", PATIENCE, || child.try_wait().unwrap().is_some());
            greeting
        } else {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            let also = theirs.try_clone().unwrap();
            command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::from(OwnedFd::from(also)));
            let mut child = command.spawn().unwrap();
            drop(command);
            let mut greeting = [0; 16];
            ours.read_exact(&mut greeting).unwrap();
            drop(ours);
            wait_until("the server ends with its client", PATIENCE, || child.try_wait().unwrap().is_some());
            greeting
        };
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT");
    }
}

#[test]
fn a_copy_that_is_interrupted_says_where_it_was_and_goes_on_there() {
    let loam = Loam::new();
    let (disk, out, socket) = (loam.path("disk"), loam.path("out"), loam.path("s"));
    let bytes = tarball::noise(3, 8 << 20);
    fs::write(&disk, &bytes).unwrap();
    let arguments = [text(&disk), "--layer".into(), "delay,read=20ms".into(), "--nbd".into(), unix(&socket)];
    let server = Serving::start(&loam, &arguments);
    let command = [
        "copy",
        server.uri(),
        &text(&out),
        "--create",
        "--resume",
        "--queue-depth",
        "1",
        "--request-size",
        "64KiB",
    ];
    let mut copy = loam.command(command);
    let mut child = copy.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(900));
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("bytes are copied and safe") && said.contains("hint: "), "{said}");
    let done: usize = said.split("first ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(done > 0 && done < bytes.len(), "{said}");
    assert!(fs::read(&out).unwrap()[..done] == bytes[..done]);
    assert!(loam.path("out.resume").exists());
    let copied = loam.run(command.iter().copied().chain(["--json"])).json();
    assert_eq!(copied["resumed_bytes"], done, "{copied}");
    assert!(fs::read(&out).unwrap() == bytes);
    assert!(!loam.path("out.resume").exists());
}

#[test]
fn a_map_of_many_extents_comes_as_it_is_walked() {
    let loam = Loam::new();
    let disk = loam.path("disk");
    let file = fs::File::create(&disk).unwrap();
    file.set_len(1 << 30).unwrap();
    for block in 0..20_000 {
        file.write_all_at(&[1; 4096], block * 16_384).unwrap();
    }
    file.sync_all().unwrap();
    let map = extents(&loam.run(["map", &text(&disk), "--json"]).json());
    assert_eq!(map.len(), 40_000);
    let end = map.iter().fold(0, |end, (offset, length, _)| {
        assert_eq!(*offset, end);
        end + length
    });
    assert_eq!(end, 1 << 30);
    let server = Serving::start(&loam, [&text(&disk), "--nbd", "tcp:127.0.0.1:0"]);
    assert_eq!(extents(&loam.run(["map", server.uri(), "--json"]).json()), map);
    let vast = loam.run(["map", "memory:4EiB", "--json"]);
    assert!(vast.elapsed < Duration::from_secs(5));
    assert_eq!(extents(&vast.json()), [(0, 4 << 60, "hole".to_owned())]);
    let mut reader = loam.command(["map", &text(&disk)]).stdout(Stdio::piped()).spawn().unwrap();
    drop(reader.stdout.take());
    assert_eq!(reader.wait().unwrap().code(), Some(0), "a reader that goes away is no error");
}

/// The certificates of docs/nbd.md, made as it says.
fn certificates(directory: &Path) {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/nbd.md")).unwrap();
    let commands = page.split("<!-- tls -->\n```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let made = Command::new("sh").args(["-ec", commands]).current_dir(directory).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[test]
fn tls_as_the_guide_sets_it_up() {
    let loam = Loam::new();
    let (directory, out) = (loam.path("pki"), loam.path("out"));
    fs::create_dir(&directory).unwrap();
    certificates(&directory);
    let arguments = [
        "pattern:1MiB",
        "--nbd",
        "tcp:localhost:0",
        "--tls",
        "require",
        "--tls-verify-peer",
        "--tls-certificates",
    ];
    let server = Serving::start(&loam, arguments.iter().map(ToString::to_string).chain([text(&directory)]));
    assert!(server.uri().starts_with("nbds://localhost:"), "{}", server.uri());
    let with = format!("{}?tls-certificates={}", server.uri(), directory.display());
    loam.run(["copy", &with, &text(&out), "--create"]).ok();
    loam_block::PatternDevice::verify(0, &fs::read(&out).unwrap()).unwrap();
    assert_eq!(loam.run(["info", &with, "--json"]).json()["export"]["tls"], true);
    let plain = loam.run(["info", &server.uri().replace("nbds", "nbd")]).fails();
    assert!(plain.contains("TLS"), "{plain}");
    let nameless = loam.path("nameless");
    fs::create_dir(&nameless).unwrap();
    fs::copy(directory.join("ca-cert.pem"), nameless.join("ca-cert.pem")).unwrap();
    let refused = loam.run(["info", &format!("{}?tls-certificates={}", server.uri(), nameless.display())]);
    refused.fails();
}
