//! `cargo xtask demo`: everything a user gets, on a real root filesystem behind a real web server, with the cost of
//! each step, and beside it what downloading and unpacking the whole costs. Ends clean, also when a step fails or on
//! Ctrl-C.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::image::{self, Image};
use crate::nginx::{Nginx, Wire};
use crate::setup;
use crate::shell::{describe, is_root, release_binary, run};

/// Requests that were under way when a step ended are logged within this.
const LOG_SETTLE: Duration = Duration::from_millis(100);

/// What a step cost.
struct Step {
    name: String,
    elapsed: Duration,
    wire: Wire,
}

struct Demo {
    binary: PathBuf,
    directory: PathBuf,
    nginx: Nginx,
    interrupted: Arc<AtomicBool>,
    steps: Vec<Step>,
}

/// The task.
pub(crate) fn run_task(arguments: &[String]) -> Result<()> {
    let quick = match arguments {
        [] => false,
        [option] if option == "--quick" => true,
        other => bail!("unknown options {other:?}"),
    };
    ensure!(is_root(), "the demo mounts and attaches loop devices: run it as root");
    setup::run_setup()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let binary = release_binary()?;
    let image = if quick { Image::busybox()? } else { Image::debian()? };
    let directory = image::directory();
    let nginx = Nginx::start(&directory.join("nginx"), &directory.join("www"))?;
    let mut demo = Demo { binary, directory, nginx, interrupted, steps: Vec::new() };
    demo.clear()?;
    let result = demo.play(&image);
    let cleared = demo.clear();
    demo.summary();
    result.and(cleared)
}

impl Demo {
    fn play(&mut self, image: &Image) -> Result<()> {
        self.publish(image)?;
        self.mount(image)?;
        self.pool(image)?;
        self.download(image)?;
        self.compare()
    }

    /// A publisher's part: the index, beside the tar; and in it what a first run reads.
    fn publish(&mut self, image: &Image) -> Result<()> {
        self.chapter("A publisher indexes a tar once and serves both with any web server");
        let tar = format!("tar:{}", image.tar.display());
        self.loam("index", &["index", &tar])?;
        let mount = self.directory.join("mnt");
        let (target, trace) =
            (mount.display().to_string(), self.directory.join("trace").display().to_string());
        self.loam("mount, to trace", &["mount", &tar, &target])?;
        self.chroot("program by chroot", &mount, image)?;
        self.loam("trace", &["trace", &target, "-o", &trace])?;
        self.loam("umount", &["umount", &target])?;
        self.loam("index, with trace", &["index", &tar, "--trace", &trace])?;
        let (tar, index) = (fs::metadata(&image.tar)?.len(), fs::metadata(index_of(&image.tar))?.len());
        println!("  {:.1} MB, index {:.2} MB: {:.2} %", mb(tar), mb(index), 100.0 * mb(index) / mb(tar));
        Ok(())
    }

    /// One image at one place.
    fn mount(&mut self, image: &Image) -> Result<()> {
        self.chapter("The shortest way: one image at one place, writable, before its data has arrived");
        let source = format!("tar:{}", self.nginx.url(&image.name()));
        let target = self.directory.join("mnt").display().to_string();
        self.loam("mount", &["mount", &source, &target])?;
        let output = self.chroot("program by chroot", Path::new(&target), image)?;
        ensure!(output == image.expected, "the program printed {output:?}");
        self.chroot("program by chroot, again", Path::new(&target), image)?;
        fs::write(Path::new(&target).join("tmp/written"), "here").context("writing into the mount")?;
        self.loam("umount", &["umount", &target])?;
        Ok(())
    }

    /// A pool for many.
    fn pool(&mut self, image: &Image) -> Result<()> {
        self.chapter("The lasting way: a pool for many images and containers");
        let source = format!("tar:{}", self.nginx.url(&image.name()));
        self.loam("init", &["init"])?;
        self.loam("up", &["up"])?;
        self.loam("add", &["add", "debian", &source])?;
        let run = [["run", "debian", "--"].as_slice(), image.program].concat();
        for name in ["run", "run, second container"] {
            let output = self.loam(name, &run)?;
            ensure!(output == image.expected, "the program printed {output:?}");
        }
        let path = self.loam("create", &["create", "web", "debian"])?;
        let (written, length) = (Path::new(&path).join("var/written"), 16 << 20);
        let bytes = loam_e2e::tarball::noise(1, length);
        println!("$ dd of={} (16 MiB, synced)", written.display());
        self.timed("write 16 MiB in it", |_| {
            fs::write(&written, &bytes)?;
            Ok(fs::File::open(&written)?.sync_all()?)
        })?;
        ensure!(fs::read(&written)? == bytes, "what was written to the container reads differently");
        self.loam("ls", &["ls"])?;
        self.loam("status", &["status"])?;
        self.loam("create, to compare", &["create", "untouched", "debian"])?;
        Ok(())
    }

    /// What everybody does without loam.
    fn download(&mut self, image: &Image) -> Result<()> {
        self.chapter("Beside it: downloading and unpacking the whole");
        let root = self.directory.join("unpacked");
        fs::create_dir_all(&root)?;
        let script =
            "curl -sSf \"$1\" | tar -x --numeric-owner --xattrs --xattrs-include='*' --acls -p -C \"$2\"";
        let url = self.nginx.url(&image.name());
        let mut shell = Command::new("sh");
        shell.args(["-euc", script, "sh", &url]).arg(&root);
        self.command("curl | tar x", "curl URL | tar x", &mut shell)?;
        self.chroot("program by chroot", &root, image)?;
        Ok(())
    }

    /// The container against what GNU tar extracted.
    fn compare(&mut self) -> Result<()> {
        self.chapter("The container against what GNU tar extracted: every byte, every property");
        let path = self.loam("show", &["show", "untouched", "--json"])?;
        let path = path.split("\"path\":\"").nth(1).and_then(|rest| rest.split('"').next());
        let container = PathBuf::from(path.context("`loam show --json` names no path")?);
        let unpacked = self.directory.join("unpacked");
        println!("$ compare {} {}", unpacked.display(), container.display());
        let report = self.timed("compare", |_| Ok(loam_e2e::compare::trees(&unpacked, &container, &[])?))?;
        for difference in report.differences.iter().take(20) {
            println!("  {difference}");
        }
        ensure!(report.differences.is_empty(), "{} differences", report.differences.len());
        println!("  {} entries, {:.1} MB of files: equal", report.entries, mb(report.bytes));
        self.loam("down", &["down"])?;
        Ok(())
    }

    fn chapter(&self, title: &str) {
        println!("\n## {title}\n");
    }

    /// Does one step and notes what it cost.
    fn timed<T>(&mut self, name: &str, step: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        if self.interrupted.load(Ordering::SeqCst) {
            bail!("interrupted");
        }
        let before = self.nginx.wire();
        let started = Instant::now();
        let result = step(self);
        let elapsed = started.elapsed();
        std::thread::sleep(LOG_SETTLE);
        let wire = self.nginx.wire() - before;
        println!("  -- {}, {}", show(elapsed), describe_wire(wire));
        self.steps.push(Step { name: name.to_string(), elapsed, wire });
        result
    }

    fn command(&mut self, name: &str, shown: &str, command: &mut Command) -> Result<String> {
        println!("$ {shown}");
        self.timed(name, |_| {
            let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
            let text = String::from_utf8_lossy(&output.stdout).trim_end().to_string();
            text.lines().for_each(|line| println!("  {line}"));
            ensure!(output.status.success(), "`{}` ended with {}", describe(command), output.status);
            Ok(text)
        })
    }

    fn loam(&mut self, name: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.loam_command(arguments);
        self.command(name, &format!("loam {}", arguments.join(" ")), &mut command)
    }

    fn loam_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("LOAM_POOL", self.directory.join("pool"));
        command
    }

    fn chroot(&mut self, name: &str, root: &Path, image: &Image) -> Result<String> {
        let mut command = Command::new("chroot");
        command.arg(root).args(image.program);
        let shown = format!("chroot {} {}", root.display(), image.program.join(" "));
        self.command(name, &shown, &mut command)
    }

    /// Nothing mounted, attached or running, and none of the demo's own files but the image: before and after.
    fn clear(&self) -> Result<()> {
        let mount = self.directory.join("mnt");
        if is_mounted(&mount)? {
            run(&mut self.loam_command(&["umount", &mount.display().to_string()]))?;
        }
        let pool = self.directory.join("pool");
        if pool.join("pool.toml").exists() {
            run(&mut self.loam_command(&["down"]))?;
        }
        if is_mounted(&pool)? || is_mounted(&mount)? {
            bail!("something is still mounted below {}", self.directory.display());
        }
        for path in [pool, self.directory.join("unpacked"), mount.clone()] {
            if path.exists() {
                fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
            }
        }
        Ok(fs::create_dir(mount)?)
    }

    fn summary(&self) {
        println!("\n## What it cost\n");
        println!("{:<28} {:>10}   on the wire", "step", "time");
        for step in &self.steps {
            println!("{:<28} {:>10}   {}", step.name, show(step.elapsed), describe_wire(step.wire));
        }
    }
}

fn index_of(tar: &Path) -> PathBuf {
    PathBuf::from(format!("{}.loam", tar.display()))
}

/// Whether anything is mounted at or below `path`.
fn is_mounted(path: &Path) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|target| Path::new(target).starts_with(path)))
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn show(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    if seconds < 1.0 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

fn describe_wire(wire: Wire) -> String {
    match wire.requests {
        0 => "nothing".to_string(),
        requests => format!("{:.2} MB in {requests} requests", mb(wire.bytes)),
    }
}
