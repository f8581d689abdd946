//! The kernel's NBD client on `loam serve`: filesystems over it, zeroes and discards that reach the file below, a server
//! that dies and comes back under I/O, and a pool whose virtual device comes by NBD. In virtual machines only: they are
//! sure to have the nbd module.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use loam_e2e::kernel_nbd::KernelNbd;
use loam_e2e::{FileServer, Loam, drop_page_cache, tarball, wait_until};
use rustix::process::{Pid, Signal, kill_process};

/// Bytes of what is served: btrfs takes no less than some hundred MiB.
const SIZE: u64 = 512 << 20;
/// The longest that anything may take, on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a command that has to end well; returns what it printed.
#[track_caller]
fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-euc", script]).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{script}` ended with {}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn load_module() {
    sh("modprobe nbd nbds_max=4 max_part=0");
}

/// `loam serve`, which ends when dropped.
struct Served {
    process: Child,
    uri: String,
}

impl Served {
    fn start(loam: &Loam, device: &str, address: &str, options: &[&str]) -> Self {
        let mut command = loam.command([&["serve", device, "--nbd", address], options].concat());
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut uri = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut uri).unwrap();
        assert!(uri.starts_with("nbd"), "`loam serve {device}` prints its URI: {uri}");
        Served { process, uri: uri.trim().to_string() }
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
        let _ = self.process.wait();
    }
}

/// A device that nbd-client connected.
struct Attached {
    name: &'static str,
}

impl Attached {
    fn to(name: &'static str, server: &[&str], options: &[&str]) -> Self {
        let device = format!("/dev/{name}");
        let words = [server, &[&device, "-b", "4096"], options].concat();
        sh(&format!("nbd-client {}", words.join(" ")));
        wait_until("the device has a size", PATIENCE, || sysfs(name, "size") != "0");
        Attached { name }
    }

    fn unix(name: &'static str, socket: &Path, options: &[&str]) -> Self {
        Attached::to(name, &["-unix", &socket.display().to_string()], options)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let ended = Command::new("nbd-client").args(["-d", &format!("/dev/{}", self.name)]).output();
        if let Err(error) = ended {
            eprintln!("{}: {error}", self.name);
        }
        wait_until("the device is gone", PATIENCE, || {
            !Path::new(&format!("/sys/block/{}/pid", self.name)).exists()
        });
    }
}

fn sysfs(name: &str, file: &str) -> String {
    let path = format!("/sys/block/{name}/{file}");
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}")).trim().to_string()
}

/// A mount that goes when dropped.
struct Mount(PathBuf);

impl Mount {
    fn btrfs(device: &Path, directory: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&directory).unwrap();
        sh(&format!("mount -t btrfs -o {options} {} {}", device.display(), directory.display()));
        Mount(directory)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let ended = Command::new("umount").arg(&self.0).output().unwrap();
        if !ended.status.success() && !std::thread::panicking() {
            panic!("umount: {}", String::from_utf8_lossy(&ended.stderr));
        }
    }
}

/// A file to serve, and the socket to serve it on.
fn image(loam: &Loam) -> (PathBuf, String, PathBuf) {
    let (image, socket) = (loam.path("image"), loam.path("socket"));
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    let device = format!("file:{}", image.display());
    (image, device, socket)
}

fn unix(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

fn allocated(file: &Path) -> u64 {
    fs::metadata(file).unwrap().blocks() * 512
}

#[test]
fn btrfs_over_the_kernels_client_keeps_its_bytes_and_gives_back_what_it_discards() {
    load_module();
    let loam = Loam::new();
    let (image, device, socket) = image(&loam);
    let served = Served::start(&loam, &device, &unix(&socket), &[]);
    let noise = tarball::noise(7, 48 << 20);
    {
        let attached = Attached::unix("nbd0", &socket, &["-C", "2"]);
        assert_eq!(sysfs("nbd0", "size").parse::<u64>().unwrap() * 512, SIZE);
        assert_eq!(sysfs("nbd0", "ro"), "0");
        sh("mkfs.btrfs -q -f /dev/nbd0");
        let mount = Mount::btrfs(Path::new("/dev/nbd0"), loam.path("mnt"), "discard=sync,commit=1");
        fs::write(mount.0.join("noise"), &noise).unwrap();
        sh(&format!("sync -f {}", mount.0.display()));
        drop_page_cache();
        assert_eq!(fs::read(mount.0.join("noise")).unwrap(), noise);
        let full = allocated(&image);
        assert!(full >= noise.len() as u64, "{full}");
        fs::remove_file(mount.0.join("noise")).unwrap();
        sh(&format!("sync -f {0}; fstrim {0}", mount.0.display()));
        wait_until("what is discarded is given back", PATIENCE, || allocated(&image) + (40 << 20) < full);
        fs::write(mount.0.join("noise"), &noise).unwrap();
        drop(mount);
        drop(attached);
    }
    drop(served);
    // And the file that was served is the filesystem.
    sh(&format!("btrfs check --readonly {}", image.display()));
    let found = loam.path("found");
    fs::create_dir(&found).unwrap();
    sh(&format!("mount -t btrfs -o loop,ro {} {}", image.display(), found.display()));
    let read = fs::read(found.join("noise"));
    sh(&format!("umount {}", found.display()));
    assert_eq!(read.unwrap(), noise);
}

#[test]
fn zeroes_and_discards_reach_the_file_and_their_neighbours_stay() {
    load_module();
    let loam = Loam::new();
    let (image, device, socket) = image(&loam);
    let noise = tarball::noise(3, 16 << 20);
    File::options().write(true).open(&image).unwrap().write_all_at(&noise, 0).unwrap();
    let _served = Served::start(&loam, &device, &unix(&socket), &[]);
    let _attached = Attached::unix("nbd0", &socket, &[]);
    for limit in ["write_zeroes_max_bytes", "discard_max_bytes"] {
        let bytes: u64 = sysfs("nbd0", &format!("queue/{limit}")).parse().unwrap();
        assert!(bytes > 0, "{limit}: the client was told that the server can");
    }
    sh("blkdiscard -z -o 4194304 -l 4194304 /dev/nbd0");
    sh("blkdiscard -o 12582912 -l 4194304 /dev/nbd0; sync");
    let mut expected = noise.clone();
    for from in [4 << 20, 12 << 20] {
        expected[from..from + (4 << 20)].fill(0);
    }
    assert!(fs::read(&image).unwrap()[..16 << 20] == expected, "zeroes where they belong, and nowhere else");
    drop_page_cache();
    let mut read = vec![0; 16 << 20];
    File::open("/dev/nbd0").unwrap().read_exact_at(&mut read, 0).unwrap();
    assert!(read == expected);
    assert!(allocated(&image) <= 12 << 20, "what was discarded is a hole: {}", allocated(&image));
}

#[test]
fn a_read_only_export_mounts_read_only_over_tcp() {
    load_module();
    let loam = Loam::new();
    let (image, device, _) = image(&loam);
    sh(&format!("mkfs.btrfs -q -f {}", image.display()));
    let before = fs::read(&image).unwrap();
    let served = Served::start(&loam, &device, "tcp:127.0.0.1:0", &["--readonly"]);
    let port = served.uri.trim_end_matches('/').rsplit(':').next().unwrap().to_string();
    let attached = Attached::to("nbd0", &["127.0.0.1", &port], &[]);
    assert_eq!(sysfs("nbd0", "ro"), "1");
    assert!(File::options().write(true).open("/dev/nbd0").and_then(|d| d.write_at(&[1; 4096], 0)).is_err());
    let mount = Mount::btrfs(Path::new("/dev/nbd0"), loam.path("mnt"), "ro");
    let refused = fs::write(mount.0.join("file"), "x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    drop(mount);
    drop(attached);
    drop(served);
    assert!(fs::read(&image).unwrap() == before, "nothing was written");
}

/// Twice, while a file is written: the server is killed, comes back on the same socket, and the kernel, which kept the
/// requests that were not answered, sends them again.
#[test]
fn a_server_that_is_killed_and_comes_back_loses_nothing() {
    load_module();
    let loam = Loam::new();
    let (_, device, socket) = image(&loam);
    let mut served = Served::start(&loam, &device, &unix(&socket), &[]);
    let attached = KernelNbd::connect(0, &socket);
    sh("mkfs.btrfs -q -f /dev/nbd0");
    let mount = Mount::btrfs(&attached.path(), loam.path("mnt"), "commit=1");
    let noise = tarball::noise(11, 64 << 20);
    let path = mount.0.join("noise");
    let writer = std::thread::spawn({
        let (noise, path) = (noise.clone(), path.clone());
        move || -> std::io::Result<()> {
            let file = File::create(path)?;
            for (number, piece) in (0..).zip(noise.chunks(4 << 20)) {
                file.write_all_at(piece, number * (4 << 20))?;
                file.sync_all()?;
            }
            Ok(())
        }
    });
    for part in [8, 32] {
        wait_until("some of it is written", PATIENCE, || {
            fs::metadata(&path).is_ok_and(|file| file.len() >= part << 20) || writer.is_finished()
        });
        assert!(!writer.is_finished(), "the server dies while there is I/O");
        served.kill();
        std::thread::sleep(Duration::from_millis(500));
        assert!(!writer.is_finished(), "the kernel waits");
        served = Served::start(&loam, &device, &unix(&socket), &[]);
        attached.reconnect(&socket);
    }
    writer.join().unwrap().expect("no write failed");
    drop_page_cache();
    assert!(fs::read(&path).unwrap() == noise);
    drop(mount);
    drop(attached);
    drop(served);
}

/// A host without ublk and without loam: the virtual device by NBD, the local one by loop, and an image's files in it.
#[test]
fn a_pools_virtual_device_comes_by_nbd() {
    load_module();
    let (loam, server) = (Loam::new(), FileServer::start());
    loam.run(["init", "--local-size", "1GiB"]).ok();
    let tree = loam.path("tree");
    fs::create_dir(&tree).unwrap();
    let noise = tarball::noise(5, 3 << 20);
    fs::write(tree.join("large"), &noise).unwrap();
    let source = loam.publish(&server, &tree, "image");
    loam.run(["up"]).ok();
    loam.run(["add", "image", &source]).ok();
    let large = loam.path_of("image").join("large");
    let large = large.strip_prefix(loam.mount()).unwrap().to_path_buf();
    loam.run(["down"]).ok();

    let socket = loam.path("socket");
    let served = Served::start(&loam, "pool:", &unix(&socket), &[]);
    let attached = Attached::unix("nbd0", &socket, &[]);
    assert_eq!(sysfs("nbd0", "ro"), "1", "a seed");
    let local = sh(&format!("losetup --find --show {}", loam.pool().join("local.img").display()));
    let local = local.trim();
    let mounted = std::panic::catch_unwind(|| {
        // Not by the mount option `device`: kernels before 6.13 or so open it for writing, which a seed does not take.
        sh(&format!("btrfs device scan /dev/nbd0 {local}"));
        let mount = Mount::btrfs(Path::new(local), loam.path("by-nbd"), "rw,noatime,ssd_spread");
        assert!(fs::read(mount.0.join(&large)).unwrap() == noise, "read from the source through NBD");
        fs::write(mount.0.join("new"), "written to the local device").unwrap();
        sh(&format!("sync -f {}", mount.0.display()));
    });
    sh(&format!("btrfs device scan --forget; losetup -d {local}"));
    if let Err(panic) = mounted {
        std::panic::resume_unwind(panic);
    }
    drop(attached);
    drop(served);
    // The pool is as good as before.
    loam.run(["up"]).ok();
    assert_eq!(fs::read_to_string(loam.mount().join("new")).unwrap(), "written to the local device");
    assert!(fs::read(loam.path_of("image").join("large")).unwrap() == noise);
}
