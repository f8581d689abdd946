//! The repository's own tasks. Kept on the standard library and very
//! little more, so that it builds in seconds on a machine that has nothing but Rust.

mod bench;
mod demo;
mod deny;
mod image;
mod nginx;
mod setup;
mod shell;
mod test;
mod test_vm;
mod tidy;
mod vm;

use std::process::ExitCode;

use anyhow::Result;

const USAGE: &str = "\
Usage: cargo xtask TASK [OPTIONS]

  setup                    install what the tests and the demo need (Debian, root)
  test [--unit|--e2e|--vm] [--kernel 6.12|7.2] [--release] [FILTER...]
                           format, lints, docs, tidy, unit tests, then the end-to-end tests (root): on this
                           machine's kernel, and in virtual machines with stock kernels (only there: --vm);
                           FILTER: a part of a test's name, or nextest's expressions, 'binary(pool_life)'
  demo [--quick]           everything a user gets, on a real image (root); --quick: a busybox image
  image                    only make the demo's image, and print its path (root)
  bench [--quick] [--rounds=N] [start|seed|read|nbd|zero]...
                           the figures of docs/benchmarks (root)
  bench read --vm [--kernel 6.12|7.2] [OPTIONS]
                           local reads where ublk and RAM disks are, beside rublk; OPTIONS of `loam bench read`
                           as --NAME=VALUE
  vm [--kernel 6.12|7.2] [--memory 4G] [--timeout SECONDS] [--share DIR] -- COMMAND...
                           run a command in a virtual machine with a stock kernel (root); DIR is its /share,
                           and what it changes there comes back
  tidy                     the rules that no compiler checks
  deny                     licences, sources and duplicate crates, where cargo-deny is installed
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let task = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    match run(&task, &rest) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask {task}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &str, arguments: &[String]) -> Result<ExitCode> {
    match task {
        "setup" => setup::run_task(arguments).map(|()| ExitCode::SUCCESS),
        "test" => test::run(arguments),
        "demo" => demo::run_task(arguments).map(|()| ExitCode::SUCCESS),
        "image" => {
            println!("{}", image::Image::debian()?.tar.display());
            Ok(ExitCode::SUCCESS)
        }
        "bench" => bench::run_task(arguments).map(|()| ExitCode::SUCCESS),
        "tidy" => tidy::run(arguments),
        "vm" => vm::run_task(arguments),
        "deny" => deny::run_task(arguments).map(|()| ExitCode::SUCCESS),
        "" | "help" | "--help" | "-h" => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        other => {
            eprint!("xtask: no task '{other}'\n\n{USAGE}");
            Ok(ExitCode::from(2))
        }
    }
}
