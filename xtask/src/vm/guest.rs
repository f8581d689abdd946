//! One run: the disks and the command are made, QEMU is started, what the command prints is passed on as it comes, and
//! whatever happens QEMU is gone at the end.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::cpio::Archive;
use super::emulator::{Accelerator, Emulator};
use super::kernel::Kernel;
use super::{Options, image};
use crate::shell::{describe, output};

/// From the start of QEMU to the start of the command. Under emulation on a busy machine it is 4 to 20 s.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// Exit code of a command that was killed for taking too long, as of timeout(1).
const TIMED_OUT: u8 = 124;
/// Exit code after Ctrl-C, as a shell has it.
const INTERRUPTED: u8 = 130;

/// Sizes of the sparse disks that the guest writes to.
const SCRATCH_BYTES: u64 = 32 << 30;
const RESULTS_BYTES: u64 = 8 << 30;

/// How many of the kernel's last words are shown when something went wrong.
const LAST_WORDS: usize = 40;

const TICK: Duration = Duration::from_millis(20);

/// What a run needs.
pub(super) struct Machine<'a> {
    pub(super) emulator: &'a Emulator,
    pub(super) kernel: &'a Kernel,
    pub(super) accelerator: Accelerator,
    pub(super) directory: &'a Path,
}

/// How a run ended.
enum Ending {
    Exited(ExitStatus),
    TimedOut,
    DidNotBoot,
    Interrupted,
}

impl Machine<'_> {
    /// Boots, runs the command to its end and returns its exit code.
    pub(super) fn run(&self, options: &Options, system: &Path, command: &[String]) -> Result<u8> {
        let run = self.directory.join("run");
        if run.exists() {
            fs::remove_dir_all(&run)?;
        }
        fs::create_dir_all(&run)?;
        let disks = self.disks(options, system, &run)?;
        fs::write(run.join("initramfs.cpio"), self.initramfs(command)?)?;
        let mut qemu = self.qemu(options, &disks, &run);
        let ending = Running::start(&mut qemu, &run)?.wait(options.timeout, &run)?;
        let said = fs::read_to_string(run.join("control")).unwrap_or_default();
        if said.lines().any(|line| line == "results")
            && let Some(share) = &options.share
        {
            output(Command::new("tar").args(["-x", "-f"]).arg(run.join("results.img")).arg("-C").arg(share))
                .context("what the guest wrote to /share")?;
        }
        let code = verdict(&ending, &said, options, &run);
        // Sparse, but they hold what the command wrote.
        for name in ["scratch.img", "results.img", "share.img"] {
            let _ = fs::remove_file(run.join(name));
        }
        code
    }

    /// The disks by serial, whether they are read-only, and where they lie.
    fn disks(
        &self,
        options: &Options,
        system: &Path,
        run: &Path,
    ) -> Result<Vec<(&'static str, bool, PathBuf)>> {
        let (scratch, results) = (run.join("scratch.img"), run.join("results.img"));
        File::create(&scratch)?.set_len(SCRATCH_BYTES)?;
        output(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-m", "0"]).arg(&scratch))?;
        File::create(&results)?.set_len(RESULTS_BYTES)?;
        let mut disks = vec![
            ("system", true, system.to_path_buf()),
            ("modules", true, self.kernel.modules.clone()),
            ("scratch", false, scratch),
            ("results", false, results),
        ];
        if let Some(share) = &options.share {
            image(share, &run.join("share.img"), 0)
                .with_context(|| format!("packing {}", share.display()))?;
            disks.push(("share", true, run.join("share.img")));
        }
        Ok(disks)
    }

    /// The kernel's initramfs with the command in it: the kernel unpacks one archive behind the other.
    fn initramfs(&self, command: &[String]) -> Result<Vec<u8>> {
        let words: Vec<String> = command.iter().map(|word| quote(word)).collect();
        let mut archive = Archive::default();
        archive.file("vm/main", true, include_bytes!("main.sh"));
        archive.file("vm/command", true, format!("exec {}\n", words.join(" ")).as_bytes());
        Ok([fs::read(&self.kernel.initramfs)?, archive.finish()].concat())
    }

    fn qemu(&self, options: &Options, disks: &[(&'static str, bool, PathBuf)], run: &Path) -> Command {
        let processors = std::thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 4));
        let mut qemu = self.emulator.command();
        qemu.args(self.accelerator.options());
        qemu.args(["-M", "q35", "-m", &options.memory, "-smp", &processors.to_string()]);
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"]);
        qemu.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(run.join("initramfs.cpio"));
        // Warnings and worse go to the console; the rest is in dmesg.
        qemu.args(["-append", "console=ttyS0 loglevel=5 panic=-1 mitigations=off rdinit=/init"]);
        qemu.arg("-serial").arg(format!("file:{}", run.join("console.log").display()));
        for (serial, read_only, path) in disks {
            let read_only = if *read_only { "on" } else { "off" };
            let path = path.display().to_string().replace(',', ",,");
            qemu.args(["-drive", &format!("file={path},if=none,id={serial},format=raw,cache=unsafe,readonly={read_only},discard=unmap")]);
            qemu.args(["-device", &format!("virtio-blk-pci,drive={serial},serial={serial}")]);
        }
        qemu.args(["-device", "virtio-serial-pci"]);
        let control = run.join("control").display().to_string();
        for (number, path) in [(1, "/dev/stdout"), (2, "/dev/stderr"), (3, control.as_str())] {
            qemu.args(["-chardev", &format!("file,id=port{number},path={path},append=on")]);
            qemu.args(["-device", &format!("virtserialport,chardev=port{number},nr={number}")]);
        }
        qemu
    }
}

/// A QEMU that is killed when this is dropped, and the threads that pass its output on.
struct Running {
    process: Child,
    output: Vec<JoinHandle<()>>,
    started: Instant,
}

impl Running {
    fn start(qemu: &mut Command, run: &Path) -> Result<Running> {
        File::create(run.join("control"))?;
        qemu.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = qemu.spawn().with_context(|| format!("cannot start `{}`", describe(qemu)))?;
        let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
        let output = vec![
            std::thread::spawn(move || pass_on(stdout, &mut std::io::stdout())),
            std::thread::spawn(move || pass_on(stderr, &mut std::io::stderr())),
        ];
        Ok(Running { process, output, started: Instant::now() })
    }

    fn wait(mut self, timeout: Duration, run: &Path) -> Result<Ending> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP]
        {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        let mut ready = None;
        let ending = loop {
            if let Some(status) = self.process.try_wait()? {
                break Ending::Exited(status);
            }
            if interrupted.load(Ordering::SeqCst) {
                break Ending::Interrupted;
            }
            match ready {
                None if fs::metadata(run.join("control"))?.len() > 0 => {
                    ready = Some(Instant::now());
                    eprintln!("vm: booted in {:.1} s", self.started.elapsed().as_secs_f64());
                }
                None if self.started.elapsed() > BOOT_TIMEOUT => break Ending::DidNotBoot,
                Some(ready) if ready.elapsed() > timeout => break Ending::TimedOut,
                _ => {}
            }
            std::thread::sleep(TICK);
        };
        self.process.kill().ok();
        self.process.wait()?;
        for thread in self.output.drain(..) {
            thread.join().ok();
        }
        Ok(ending)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn pass_on(from: Option<impl Read>, to: &mut impl Write) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 16 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 || to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}

/// The exit code that the guest told, or why there is none.
fn verdict(ending: &Ending, said: &str, options: &Options, run: &Path) -> Result<u8> {
    let console = fs::read(run.join("console.log")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    for line in console.lines().filter(|line| is_trouble(line)) {
        eprintln!("vm: the kernel says: {}", line.trim());
    }
    let code = said.lines().find_map(|line| line.strip_prefix("exit "));
    if let Some(code) = code {
        return code.parse::<u8>().context("the guest tells its command's exit code");
    }
    eprintln!("vm: the last of the console ({}):", run.join("console.log").display());
    let lines: Vec<&str> = console.lines().collect();
    for line in &lines[lines.len().saturating_sub(LAST_WORDS)..] {
        eprintln!("    {line}");
    }
    match ending {
        Ending::TimedOut => {
            eprintln!("vm: killed after {} s (--timeout)", options.timeout.as_secs());
            Ok(TIMED_OUT)
        }
        Ending::Interrupted => Ok(INTERRUPTED),
        Ending::DidNotBoot => bail!("the virtual machine did not boot within {} s", BOOT_TIMEOUT.as_secs()),
        Ending::Exited(status) => {
            ensure!(status.success(), "QEMU ended with {status}");
            bail!("the virtual machine ended before its command did: a kernel panic?")
        }
    }
}

/// What a kernel says when something of its own is broken.
fn is_trouble(line: &str) -> bool {
    ["BUG:", "WARNING:", "Oops", "Kernel panic", "blocked for more than", "soft lockup", "rcu_sched"]
        .iter()
        .any(|sign| line.contains(sign))
}

/// A word as a shell takes it.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::{is_trouble, quote};

    #[test]
    fn words_reach_the_guest_as_they_are() {
        assert_eq!(quote("echo $HOME"), "'echo $HOME'");
        assert_eq!(quote("it's"), r"'it'\''s'");
    }

    #[test]
    fn the_kernels_own_trouble_is_told_from_its_chatter() {
        assert!(is_trouble("[    5.1] BUG: kernel NULL pointer dereference"));
        assert!(is_trouble("INFO: task loam:12 blocked for more than 120 seconds."));
        assert!(!is_trouble("[    0.1] spectre: mitigations off"));
    }
}
