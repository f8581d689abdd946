//! The others' own programs against `loam serve`: qemu-img, qemu-io, qemu-nbd, nbdinfo, nbdcopy, libnbd's Python, fio's nbd
//! engine and nbdkit as a client. None needs root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

mod nbd_support;

/// No program here may take longer, in seconds.
const LIMIT_SECONDS: u32 = 100;
const PLAIN: [&str; 1] = ["memory:64M"];

/// A running `loam serve`, and a directory for images.
struct Served {
    child: Child,
    directory: tempfile::TempDir,
    uris: Vec<String>,
}

impl Served {
    /// On a Unix socket, with these arguments.
    fn start(arguments: &[&str]) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("unix:{}", directory.path().join("socket").display());
        Served::at(directory, arguments, &address)
    }

    fn at(directory: tempfile::TempDir, arguments: &[&str], address: &str) -> Served {
        let mut child = Command::new(loam_e2e::binary())
            .arg("serve")
            .args(arguments)
            .args(["--nbd", address])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let uris: Vec<_> = line.split_whitespace().map(String::from).collect();
        assert!(!uris.is_empty(), "the server {arguments:?} did not say where it is");
        Served { child, directory, uris }
    }

    fn uri(&self) -> &str {
        &self.uris[0]
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    /// SIGTERM, and how it ended.
    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
        assert!(!self.socket().exists(), "the socket is gone with the server");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Runs a program of the distribution's to its end: whether it succeeded, its output, and its complaints.
fn run(words: &[&str]) -> (bool, String, String) {
    let path = format!("/usr/bin:/usr/sbin:{}", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("timeout")
        .args(["--kill-after=5", &LIMIT_SECONDS.to_string()])
        .args(words)
        .env("PATH", path)
        .env("LOAM", loam_e2e::binary())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

/// The output of a program that has to succeed.
#[track_caller]
fn ok(words: &[&str]) -> String {
    let (success, stdout, stderr) = run(words);
    assert!(success, "{words:?}\n{stdout}\n{stderr}");
    stdout
}

/// What a program that has to fail says.
#[track_caller]
fn fails(words: &[&str]) -> String {
    let (success, stdout, stderr) = run(words);
    assert!(!success, "{words:?} was to fail\n{stdout}\n{stderr}");
    stdout + &stderr
}

#[track_caller]
fn json(words: &[&str]) -> Value {
    let text = ok(words);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words:?}: {error} in {text}"))
}

/// A raw image of `size` bytes: every other MiB is a hole, the rest is of many values.
fn half_sparse(path: &Path, size: u64) -> PathBuf {
    use std::os::unix::fs::FileExt;
    const MIB: u64 = 1 << 20;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    for at in (0..size).step_by(2 * MIB as usize) {
        let bytes: Vec<u8> = (0..MIB).map(|i| ((at + i) / 509 % 251) as u8 + 1).collect();
        file.write_all_at(&bytes, at).unwrap();
    }
    path.to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs Python with libnbd; `uri` and the other arguments are `argv`.
#[track_caller]
fn python(script: &str, arguments: &[&str]) -> String {
    let script = format!("{}\n{script}", include_str!("nbd_server/common.py"));
    let words: Vec<&str> = [&["/usr/bin/python3", "-c", &script], arguments].concat();
    ok(&words)
}

#[test]
fn nbdinfo_sees_all_that_is_offered() {
    let served = Served::start(&["memory:64M", "--description", "a disk"]);
    let info = json(&["nbdinfo", "--json", served.uri()]);
    assert_eq!((&info["protocol"], &info["structured"]), (&"newstyle-fixed".into(), &true.into()));
    let export = &info["exports"][0];
    for able in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
        assert_eq!(export[format!("can_{able}")], true, "{able}");
        assert_eq!(ok(&["nbdinfo", "--can", &able.replace('_', "-"), served.uri()]), "", "{able}");
    }
    assert_eq!((&export["is_read_only"], &export["is_rotational"]), (&false.into(), &false.into()));
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "loam:locality"]));
    assert_eq!((&export["export-size"], &export["block_size_minimum"]), (&(64 << 20).into(), &1.into()));
    assert_eq!(ok(&["nbdinfo", "--size", served.uri()]).trim(), (64 << 20).to_string());
    fails(&["nbdinfo", "--is", "read-only", served.uri()]);
    assert!(ok(&["nbdinfo", "--list", served.uri()]).contains("a disk"));

    ok(&["qemu-io", "-f", "raw", served.uri(), "-c", "write -P 1 1M 64k", "-c", "flush"]);
    let map = json(&["nbdinfo", "--map", "--json", served.uri()]);
    let runs: Vec<_> =
        map.as_array().unwrap().iter().map(|run| (run["length"].as_u64(), run["type"].as_u64())).collect();
    assert_eq!(runs, [(Some(1 << 20), Some(3)), (Some(65536), Some(0)), (Some((63 << 20) - 65536), Some(3))]);
    let locality = json(&["nbdinfo", "--map=loam:locality", "--json", served.uri()]);
    assert_eq!(
        (&locality[0]["length"], &locality[0]["type"]),
        (&(64 << 20).into(), &0.into()),
        "all is local"
    );
    served.stop();
}

#[test]
fn nbdcopy_in_and_out() {
    let served = Served::start(&PLAIN);
    let source = half_sparse(&served.path("source"), 64 << 20);
    for (index, options) in [
        &[][..],
        &["--connections=4", "--requests=32"],
        &["--no-extents", "--synchronous"],
        &["--allocated", "--flush"],
    ]
    .into_iter()
    .enumerate()
    {
        let destination = served.path(&format!("out-{index}"));
        ok(&[&["nbdcopy"], options, &[text(&source), served.uri()]].concat());
        ok(&[&["nbdcopy"], options, &[served.uri(), text(&destination)]].concat());
        ok(&["cmp", text(&source), text(&destination)]);
    }
    ok(&["nbdcopy", text(&source), served.uri()]);
    assert_eq!(
        json(&["nbdinfo", "--map", "--json", served.uri()]).as_array().unwrap().len(),
        64,
        "holes are holes again"
    );
}

#[test]
fn qemu_img_converts_maps_compares_and_measures() {
    let served = Served::start(&PLAIN);
    let source = half_sparse(&served.path("source"), 64 << 20);
    let (raw, qcow2) = (served.path("raw"), served.path("qcow2"));
    for options in [&[][..], &["-W", "-m", "16"], &["-S", "0"]] {
        ok(&[
            &["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw"],
            options,
            &[text(&source), served.uri()],
        ]
        .concat());
        ok(&["qemu-img", "compare", "-f", "raw", "-F", "raw", text(&source), served.uri()]);
    }
    ok(&["qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri(), text(&raw)]);
    ok(&["cmp", text(&source), text(&raw)]);
    ok(&["qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri(), text(&qcow2)]);
    ok(&["qemu-img", "compare", "-F", "qcow2", served.uri(), text(&qcow2)]);

    ok(&["nbdcopy", text(&source), served.uri()]);
    let map = json(&["qemu-img", "map", "-f", "raw", "--output=json", served.uri()]);
    let map = map.as_array().unwrap();
    assert_eq!(map.len(), 64);
    assert!(
        map.iter()
            .enumerate()
            .all(|(index, run)| run["zero"] == (index % 2 == 1) && run["length"] == 1 << 20)
    );
    for write in [&["-d", "32"][..], &["-d", "32", "-w"], &["-d", "8", "-w", "--flush-interval=16"]] {
        ok(&[&["qemu-img", "bench", "-f", "raw", "-c", "2000"], write, &[served.uri()]].concat());
    }
    served.stop();
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back() {
    let served = Served::start(&PLAIN);
    let steps = [
        "write -P 7 100 5000",
        "read -P 7 100 5000",
        "read -P 0 0 100",
        "write -f -P 8 1M 64k",
        "write -z 1030k 8k",
        "write -z -u 1048k 8k",
        "read -P 0 1030k 8k",
        "read -P 0 1048k 8k",
        "read -P 8 1038k 10k",
        "discard 2M 1M",
        "aio_write -P 9 3M 1M",
        "aio_write -P 10 4M 1M",
        "aio_flush",
        "read -P 9 3M 1M",
        "read -P 10 4M 1M",
        "writev -P 11 5M 512 1536 100k",
        "readv -P 11 5M 50k 50k",
        "flush",
        "write -P 12 67108863 1",
        "read -P 12 67108863 1",
    ];
    let mut words = vec!["qemu-io", "-f", "raw", served.uri()];
    words.extend(steps.iter().flat_map(|step| ["-c", *step]));
    let said = ok(&words);
    assert!(!said.contains("failed"), "{said}");
    let said = run(&["qemu-io", "-f", "raw", served.uri(), "-c", "read -P 13 0 512"]);
    assert!(said.1.contains("Pattern verification failed"), "the tool can tell: {said:?}");
}

#[test]
fn exports_by_name_and_the_list_of_them() {
    let directory = tempfile::tempdir().unwrap();
    let disk = half_sparse(&directory.path().join("disk"), 8 << 20);
    let named = format!("disk={}", disk.display());
    let served = Served::start(&[&named, "pattern=pattern:1M", "zeroes=null:4G"]);
    let list = ok(&["qemu-nbd", "--list", "-k", text(&served.socket())]);
    assert!(list.contains("exports available: 3") && list.contains("'pattern'"), "{list}");
    assert_eq!(served.uris.len(), 3);
    let sizes: Vec<_> = served.uris.iter().map(|uri| ok(&["nbdinfo", "--size", uri])).collect();
    assert_eq!(sizes, ["8388608\n", "1048576\n", "4294967296\n"]);
    ok(&["qemu-img", "compare", "-f", "raw", "-F", "raw", text(&disk), &served.uris[0]]);
    let unknown = served.uris[0].replace("disk", "none");
    assert!(fails(&["nbdinfo", "--size", &unknown]).contains("none") || unknown.contains("none"));
    let tcp = Served::at(tempfile::tempdir().unwrap(), &["pattern:1M"], "tcp:localhost:0");
    assert!(tcp.uri().starts_with("nbd://"), "{}", tcp.uri());
    assert_eq!(ok(&["nbdinfo", "--size", tcp.uri()]), "1048576\n");
}

#[test]
fn a_read_only_export_refuses_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let disk = half_sparse(&directory.path().join("disk"), 8 << 20);
    for arguments in
        [&[text(&disk), "--readonly"][..], &[text(&disk), "--layer", "readonly"], &["pattern:8M"]]
    {
        let served = Served::start(arguments);
        ok(&["nbdinfo", "--is", "read-only", served.uri()]);
        fails(&["nbdinfo", "--can", "zero", served.uri()]);
        fails(&["qemu-io", "-f", "raw", served.uri(), "-c", "write 0 512"]);
        ok(&["qemu-io", "-r", "-f", "raw", served.uri(), "-c", "read 0 512"]);
        python(include_str!("nbd_server/read_only.py"), &[served.uri()]);
    }
}

#[test]
fn libnbd_asks_for_everything_right_and_wrong() {
    let served = Served::start(&PLAIN);
    python(include_str!("nbd_server/requests.py"), &[served.uri()]);
    python(include_str!("nbd_server/options.py"), &[served.uri()]);
    served.stop();
}

#[test]
fn fio_verifies_what_it_wrote() {
    let served = Served::start(&["memory:32M"]);
    let uri = format!("--uri={}", served.uri());
    let job = [
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--iodepth=32",
    ];
    let verify = [
        "--verify=crc32c",
        "--verify_fatal=1",
        "--size=32M",
        "--randseed=7",
        "--verify_backlog=64",
        "--verify_state_save=0",
        "--output-format=terse",
    ];
    ok(&[&job[..], &verify].concat());
}

#[test]
fn nbdkit_as_a_client() {
    let served = Served::start(&PLAIN);
    let uri = format!("uri={}", served.uri());
    let kit = nbd_support::nbdkit(&["nbd", &uri, "shared=true"]);
    let source = half_sparse(&served.path("source"), 64 << 20);
    ok(&["nbdcopy", text(&source), &kit.uri()]);
    ok(&["qemu-img", "compare", "-f", "raw", "-F", "raw", text(&source), &kit.uri()]);
    ok(&["qemu-img", "compare", "-f", "raw", "-F", "raw", text(&source), served.uri()]);
}

#[test]
fn started_by_the_client() {
    let binary = loam_e2e::binary();
    // Square brackets: the tool listens, and passes the socket as systemd does.
    let said = ok(&["nbdinfo", "--size", "--", "[", text(&binary), "serve", "pattern:1M", "]"]);
    assert!(said.ends_with("\n1048576\n"), "the server's own line, then the size: {said}");
    python(include_str!("nbd_server/started.py"), &[text(&binary)]);
}

/// Certificates as the documentation makes them, by openssl: an authority, a server called localhost, a client.
fn certificates(directory: &Path) {
    let script = r#"
        cd "$1"
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=test authority" -keyout ca-key.pem -out ca-cert.pem
        for who in server client; do
            openssl req -newkey rsa:2048 -nodes -subj "/CN=localhost" -keyout $who-key.pem -out $who.csr
            printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n' > extensions
            openssl x509 -req -days 2 -in $who.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -extfile extensions -out $who-cert.pem
        done
    "#;
    ok(&["sh", "-e", "-c", script, "sh", text(directory)]);
}

#[test]
fn tls_refused_allowed_and_required() {
    let directory = tempfile::tempdir().unwrap();
    certificates(directory.path());
    let certificates = text(directory.path());
    let start = |tls: &[&str]| {
        let arguments = [&["pattern:1M", "--tls-certificates", certificates], tls].concat();
        Served::at(tempfile::tempdir().unwrap(), &arguments, "tcp:localhost:0")
    };
    let plain_of = |served: &Served| served.uri().replace("nbds:", "nbd:");
    let secure_of = |served: &Served| {
        format!("{}?tls-certificates={certificates}", plain_of(served).replace("nbd:", "nbds:"))
    };
    let size = |uri: &str| run(&["nbdinfo", "--size", uri]).0;
    let qemu = |served: &Served| {
        let port = served.uri().rsplit_once(':').unwrap().1.trim_end_matches('/');
        let credentials = format!("tls-creds-x509,id=tls,dir={certificates},endpoint=client");
        let image = format!("driver=nbd,host=localhost,port={port},tls-creds=tls");
        run(&["qemu-img", "info", "--object", &credentials, "--image-opts", &image])
    };

    let refuse = Served::at(tempfile::tempdir().unwrap(), &["pattern:1M"], "tcp:localhost:0");
    assert!(size(&plain_of(&refuse)) && !size(&secure_of(&refuse)));
    assert!(!qemu(&refuse).0);

    let allow = start(&["--tls", "on"]);
    assert!(size(&plain_of(&allow)) && size(&secure_of(&allow)));
    assert!(qemu(&allow).0, "{:?}", qemu(&allow));
    let info = json(&["nbdinfo", "--json", &secure_of(&allow)]);
    assert_eq!(info["TLS"], true);

    let require = start(&["--tls", "require"]);
    assert!(require.uri().starts_with("nbds://"), "{}", require.uri());
    assert!(!size(&plain_of(&require)) && size(&secure_of(&require)));
    assert!(qemu(&require).0);
    ok(&["nbdcopy", &secure_of(&require), text(&directory.path().join("copy"))]);

    let verified = start(&["--tls", "require", "--tls-verify-peer"]);
    assert!(size(&secure_of(&verified)), "a client that the authority knows");
    let stranger = tempfile::tempdir().unwrap();
    std::fs::copy(directory.path().join("ca-cert.pem"), stranger.path().join("ca-cert.pem")).unwrap();
    let nobody = secure_of(&verified).replace(certificates, text(stranger.path()));
    assert!(!size(&nobody), "a client without a certificate");
}

#[test]
fn layers_are_seen_through_the_tools() {
    let slow = Served::start(&["memory:1M", "--layer", "delay,read=400ms"]);
    let begun = Instant::now();
    ok(&[
        "qemu-io",
        "-f",
        "raw",
        slow.uri(),
        "-c",
        "aio_read 0 4k",
        "-c",
        "aio_read 8k 4k",
        "-c",
        "aio_read 64k 4k",
        "-c",
        "aio_flush",
    ]);
    let elapsed = begun.elapsed().as_millis();
    assert!((400..1100).contains(&elapsed), "three at once wait once: {elapsed} ms");

    let faulty = Served::start(&[
        "memory:1M",
        "--layer",
        "fault,on=read,offset=64K,length=4K",
        "--layer",
        "fault,on=write,error=ENOSPC,offset=512K",
    ]);
    let io = |step| {
        let (_, stdout, stderr) = run(&["qemu-io", "-f", "raw", faulty.uri(), "-c", step]);
        stdout + &stderr
    };
    assert!(io("read 64k 512").contains("Input/output error"));
    assert!(io("write 512k 512").contains("No space left on device"));
    assert!(!io("read 0 64k").contains("failed"));

    let cases = [
        ("nozero", false, false),
        ("nozero,zero=plugin,fast-zero=none", true, false),
        ("nozero,zero=plugin,fast-zero=slow", true, true),
        ("nozero,zero=emulate", true, true),
    ];
    for (layer, zero, fast_zero) in cases {
        let served = Served::start(&["memory:1M", "--layer", layer]);
        let export = json(&["nbdinfo", "--json", served.uri()])["exports"][0].clone();
        assert_eq!(
            (&export["can_zero"], &export["can_fast_zero"]),
            (&zero.into(), &fast_zero.into()),
            "{layer}"
        );
    }

    let opaque = Served::start(&["memory:1M", "--layer", "noextents"]);
    let map = json(&["nbdinfo", "--map", "--json", opaque.uri()]);
    assert_eq!((&map[0]["length"], &map[0]["type"]), (&(1 << 20).into(), &0.into()));

    let directory = tempfile::tempdir().unwrap();
    let (log, stats) = (directory.path().join("log"), directory.path().join("stats"));
    let layers = [
        format!("log,file={}", log.display()),
        "blocksize,offer=4096,maximum=64K".to_owned(),
        format!("stats,format=json,file={}", stats.display()),
    ];
    let served =
        Served::start(&["memory:1M", "--layer", &layers[0], "--layer", &layers[1], "--layer", &layers[2]]);
    python(include_str!("nbd_server/blocks.py"), &[served.uri()]);
    served.stop();
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains(" Write id=1 offset=0x0 count=0x40000 ...\n"), "{log}");
    let stats: Value = serde_json::from_str(&std::fs::read_to_string(stats).unwrap()).unwrap();
    let write =
        stats["operations"].as_array().unwrap().iter().find(|one| one["operation"] == "write").unwrap();
    assert_eq!((&write["requests"], &write["bytes"]), (&4.into(), &(256 << 10).into()));
}
