//! Cold start: from nothing to the output of a program whose root filesystem lies behind a link. By `loam mount` and
//! chroot; by a pool that is up (`add`, `create`, `run`); and, beside them in the same rounds, by downloading and
//! unpacking a whole tar.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::Common;
use crate::process::{Sandbox, timed};
use crate::record::{Metrics, Recorder};
use crate::shape::{Link, Shaper};

/// `loam bench start`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The image: tar:http://HOST/PATH with its index beside it. Only plain HTTP can be led through the link.
    source: String,
    /// Another index of the same tar, with a trace in it (`loam index --trace`): mounted and added beside the other.
    #[arg(long, value_name = "URL")]
    traced: Option<String>,
    /// A tar of the same tree (.tar, .tar.gz, .tar.xz, .tar.zst) to download and unpack beside it; may be given
    /// often [default: the source].
    #[arg(long, value_name = "URL")]
    download: Vec<String>,
    /// A link; may be given often [default: 20ms,100mbit 2ms,1000mbit 100ms,50mbit; with --quick the first].
    #[arg(long, value_name = "MS,MBIT")]
    link: Vec<Link>,
    /// What the program has to print.
    #[arg(long, default_value = "1")]
    expect: String,
    /// Where trees are unpacked and pools made.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,
    #[command(flatten)]
    common: Common,
    /// The program in the image.
    #[arg(last = true, default_values = ["python3", "-c", "print(1)"])]
    program: Vec<String>,
}

const DEFAULT_LINKS: [(u64, u32); 3] = [(20, 100), (2, 1000), (100, 50)];

/// `http://HOST[:PORT]/PATH`, in its parts.
struct Url<'a> {
    authority: &'a str,
    path: &'a str,
}

impl<'a> Url<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let rest = text.strip_prefix("http://").with_context(|| format!("{text}: not an http:// URL"))?;
        let (authority, path) = rest.split_once('/').with_context(|| format!("{text}: no path"))?;
        Ok(Url { authority, path })
    }

    fn address(&self) -> Result<SocketAddr> {
        let default = format!("{}:80", self.authority);
        let authority = if self.authority.contains(':') { self.authority } else { &default };
        let mut addresses = authority.to_socket_addrs().with_context(|| format!("looking up {authority}"))?;
        addresses.next().with_context(|| format!("{authority} has no address"))
    }

    fn through(&self, shaper: &Shaper) -> String {
        format!("http://{}/{}", shaper.address(), self.path)
    }
}

/// What every case gets.
struct Job<'a> {
    options: &'a Options,
    shaper: Shaper,
    sandbox: Sandbox,
}

impl Job<'_> {
    /// The arguments that name the image, led through the link.
    fn image(&self, source: &str, index: Option<&str>) -> Result<Vec<String>> {
        let mut arguments = vec![format!("tar:{}", Url::parse(source)?.through(&self.shaper))];
        if let Some(index) = index {
            arguments.extend(["--index".to_string(), Url::parse(index)?.through(&self.shaper)]);
        }
        Ok(arguments)
    }

    /// Runs the program in `root`; its output has to be the expected one.
    fn chroot(&self, root: &Path) -> Result<Duration> {
        let (output, elapsed) = timed(Command::new("chroot").arg(root).args(&self.options.program))?;
        self.expect(&output)?;
        Ok(elapsed)
    }

    fn expect(&self, output: &str) -> Result<()> {
        let expected = &self.options.expect;
        ensure!(output == expected, "the program printed {output:?} instead of {expected:?}");
        Ok(())
    }

    fn traffic(&self, metrics: &mut Metrics) {
        let traffic = self.shaper.traffic();
        metrics.insert("wire_bytes".into(), traffic.down_bytes as f64);
        metrics.insert("requests".into(), traffic.requests as f64);
    }
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> Result<()> {
    let Some(source) = options.source.strip_prefix("tar:") else {
        bail!("{}: the source has to be tar:http://...", options.source);
    };
    let downloads = match options.download.is_empty() {
        true => vec![source.to_string()],
        false => options.download.clone(),
    };
    let mut recorder = Recorder::open(&options.common.out)?;
    for round in 0..options.common.rounds() {
        for link in links(options) {
            let setting = link.to_string();
            let job = |url: &str| -> Result<Job<'_>> {
                let shaper = Shaper::start(link, Url::parse(url)?.address()?)?;
                Ok(Job { options, shaper, sandbox: Sandbox::new(&options.scratch)? })
            };
            recorder
                .measure(("start", &setting, "loam mount", round), || by_mount(job(source)?, source, None))?;
            recorder
                .measure(("start", &setting, "loam pool", round), || by_pool(job(source)?, source, None))?;
            if let index @ Some(_) = options.traced.as_deref() {
                let case = ["loam mount, traced", "loam pool, traced"];
                recorder
                    .measure(("start", &setting, case[0], round), || by_mount(job(source)?, source, index))?;
                recorder
                    .measure(("start", &setting, case[1], round), || by_pool(job(source)?, source, index))?;
            }
            for url in &downloads {
                let case = format!("curl | tar x ({})", url.rsplit('/').next().unwrap_or(url));
                recorder.measure(("start", &setting, &case, round), || by_download(job(url)?, url))?;
            }
        }
    }
    Ok(())
}

fn links(options: &Options) -> Vec<Link> {
    if !options.link.is_empty() {
        return options.link.clone();
    }
    let default =
        DEFAULT_LINKS.map(|(ms, megabits)| Link { round_trip: Duration::from_millis(ms), megabits });
    if options.common.quick { default[..1].to_vec() } else { default.to_vec() }
}

fn seconds(metrics: &mut Metrics, name: &str, elapsed: Duration) {
    metrics.insert(format!("{name}_seconds"), elapsed.as_secs_f64());
}

/// `loam mount`, then the program by chroot.
fn by_mount(mut job: Job<'_>, source: &str, index: Option<&str>) -> Result<Metrics> {
    let arguments = job.image(source, index)?;
    let mut metrics = Metrics::new();
    let started = Instant::now();
    let (root, mounted) = job.sandbox.mount(&arguments)?;
    job.chroot(&root)?;
    seconds(&mut metrics, "total", started.elapsed());
    seconds(&mut metrics, "mounted", mounted);
    job.traffic(&mut metrics);
    Ok(metrics)
}

/// `add`, `create` and `run` in a pool that is up already; then a second container of the same image.
fn by_pool(mut job: Job<'_>, source: &str, index: Option<&str>) -> Result<Metrics> {
    let arguments = job.image(source, index)?;
    let mut metrics = Metrics::new();
    let program: Vec<&str> = job.options.program.iter().map(String::as_str).collect();
    seconds(&mut metrics, "init", job.sandbox.loam(["init"])?.1);
    let up = job.sandbox.up()?;
    seconds(&mut metrics, "up", up);
    let run = [["run", "image", "--"].as_slice(), &program].concat();
    let add = [vec!["add".to_string(), "image".to_string()], arguments].concat();
    let started = Instant::now();
    seconds(&mut metrics, "add", job.sandbox.loam(add.iter())?.1);
    seconds(&mut metrics, "create", job.sandbox.loam(["create", "kept", "image"])?.1);
    let (output, elapsed) = job.sandbox.loam(&run)?;
    seconds(&mut metrics, "total", started.elapsed());
    seconds(&mut metrics, "run", elapsed);
    job.expect(&output)?;
    job.traffic(&mut metrics);
    let (output, elapsed) = job.sandbox.loam(&run)?;
    job.expect(&output)?;
    seconds(&mut metrics, "second", elapsed);
    Ok(metrics)
}

/// `curl | tar x`, then the program by chroot, twice: the second time is what the program costs on the host.
fn by_download(job: Job<'_>, url: &str) -> Result<Metrics> {
    let root = job.sandbox.path("root");
    std::fs::create_dir(&root)?;
    let decoder = match url.rsplit('.').next() {
        Some("gz" | "tgz") => "--gzip",
        Some("xz") => "--xz",
        Some("zst") => "--zstd",
        _ => "--no-auto-compress",
    };
    let script = "curl -sSf \"$1\" | tar -x --numeric-owner \"$2\" -C \"$3\"";
    let mut metrics = Metrics::new();
    let started = Instant::now();
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh", &Url::parse(url)?.through(&job.shaper), decoder]).arg(&root);
    let (_, unpacked) = timed(&mut shell)?;
    job.chroot(&root)?;
    seconds(&mut metrics, "total", started.elapsed());
    seconds(&mut metrics, "mounted", unpacked);
    job.traffic(&mut metrics);
    let warm = job.chroot(&root)?;
    seconds(&mut metrics, "second", warm);
    Ok(metrics)
}

#[cfg(test)]
mod tests {
    use super::Url;

    #[test]
    fn urls_come_apart() {
        let url = Url::parse("http://127.0.0.1:8080/a/b.tar").unwrap();
        assert_eq!((url.authority, url.path), ("127.0.0.1:8080", "a/b.tar"));
        assert_eq!(url.address().unwrap().port(), 8080);
        assert!(Url::parse("https://host/x").is_err());
        assert!(Url::parse("http://host").is_err());
    }
}
