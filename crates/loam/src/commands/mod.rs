//! One function for each command: call the library, print what it says.

mod copy;
mod device_info;
mod image;
mod internal;
mod mount;
mod pool;
mod quota;
mod range;
mod seed;
mod serve;

use std::process::ExitCode;

use loam_pool::{Client, PoolDirectory};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::arguments::{Arguments, Command};

/// What every command gets.
pub(crate) struct Context {
    /// The pool that was chosen.
    pub(crate) directory: PoolDirectory,
    /// Its daemon.
    pub(crate) client: Client,
    /// Facts as JSON.
    pub(crate) json: bool,
}

/// Runs the command; the exit code is the program's for `run`, else 0.
pub(crate) fn dispatch(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let directory = PoolDirectory::new(&arguments.pool)?;
    let context = Context { client: Client::new(&directory), directory, json: arguments.json };
    let command = match arguments.command {
        Command::Internal { command } => return internal::run(&context, command),
        Command::Bench(options) => return loam_bench::run(*options).map(|()| ExitCode::SUCCESS),
        Command::Seed { command } => return seed::run(&context, command).map(|()| ExitCode::SUCCESS),
        Command::Quota { command } => return quota::run(&context, command),
        Command::Serve(options) => return on_all_processors(serve::run(&context, *options)),
        Command::Copy(options) => return on_all_processors(copy::run(&context, *options)),
        Command::Info(options) => return on_all_processors(device_info::info(&context, options)),
        Command::Map(options) => return on_all_processors(device_info::map(&context, options)),
        other => other,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // A program in a container gets the signals itself, and a mount in the foreground ends by them.
        match command {
            Command::Run(options) => image::run(&context, options).await,
            Command::Mount(options) => mount::mount(&context, options).await.map(|()| ExitCode::SUCCESS),
            command => unless_interrupted(asynchronous(&context, command)).await,
        }
    })
}

/// Runs commands that move blocks themselves.
fn on_all_processors(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_env_filter(log_filter("warn"))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    // A thread that waits for standard input would be waited for.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// What `LOAM_LOG` says, else messages from `level` on.
fn log_filter(level: &str) -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::try_from_env("LOAM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level))
}

/// The result of `work`, which is dropped on Ctrl-C or SIGTERM: that undoes what it had begun.
async fn unless_interrupted<T, E: Into<anyhow::Error>>(
    work: impl Future<Output = Result<T, E>>,
) -> anyhow::Result<T> {
    tokio::select! {
        result = work => result.map_err(Into::into),
        () = interrupted() => Err(loam_pool::Error::Interrupted("the command".into()).into()),
    }
}

async fn asynchronous(context: &Context, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check { read_data } => return pool::check(context, read_data).await,
        Command::Umount { directory } => mount::umount(context, &directory).await?,
        Command::Init(options) => pool::init(context, options)?,
        Command::Up(options) => pool::up(context, options).await?,
        Command::Down => pool::down(context).await?,
        Command::Status => pool::status(context).await?,
        Command::Index(options) => image::index(context, options).await?,
        Command::Trace { name, output } => image::trace(context, &name, output).await?,
        Command::Add { name, source, index, prefetch } => {
            image::add(context, name, source, index, prefetch).await?;
        }
        Command::Create { name, image, quota } => image::create(context, name, image, quota).await?,
        Command::Ls => image::list(context).await?,
        Command::Show { name } => image::show(context, &name).await?,
        Command::Rm { names } => image::remove(context, &names).await?,
        Command::Pin { name, paths } => image::pin(context, name, paths).await?,
        Command::Evict { keep } => pool::evict(context, keep.0).await?,
        Command::Range { command } => range::run(context, command).await?,
        Command::Run(_)
        | Command::Mount(_)
        | Command::Seed { .. }
        | Command::Quota { .. }
        | Command::Bench(_)
        | Command::Serve(_)
        | Command::Copy(_)
        | Command::Info(_)
        | Command::Map(_)
        | Command::Internal { .. } => {
            unreachable!("dispatched above")
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Completes on Ctrl-C or SIGTERM.
async fn interrupted() {
    match Signals::catch() {
        Ok(mut signals) => signals.received().await,
        Err(_) => std::future::pending().await,
    }
}

/// Ctrl-C and SIGTERM, from now on.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn catch() -> std::io::Result<Self> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Completes on the next one.
    async fn received(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
