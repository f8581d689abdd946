//! The holder itself: starts the worker, keeps what it is given, and starts it again when it dies. One thread, no
//! knowledge of what the descriptors are, next to nothing that could fail.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use loam_sys::fds;
use loam_sys::process::{Isolation, inherit};
use rustix::process::{Pid, Signal};
use sd_notify::NotifyState;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};

use super::{MESSAGE_MAX, Message, SOCKET_VARIABLE, STORED_MAX};
use crate::{Error, Result};

/// A worker that lived this long after it was ready did serve: its death is not held against the next.
const QUICK_DEATH: Duration = Duration::from_millis(100);
/// After so many quick deaths in a row the holder gives up.
const QUICK_DEATHS_MAX: u32 = 16;
/// The pause before the second restart after quick deaths; it doubles with each.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The exit status of a Rust program that panicked.
const PANIC_STATUS: i32 = 101;

/// How a holder's work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The worker ended as it should: with success, as it said it would, after a signal that was passed on to it, or
    /// before it had ever served.
    Worker(ExitStatus),
    /// The worker died too often, too soon. What it served is gone: readers get errors.
    GaveUp {
        /// Deaths in a row.
        deaths: u32,
        /// How the last one ended.
        last: ExitStatus,
    },
}

/// Runs `worker` (made anew for each start) until it ends for good, keeping its descriptors meanwhile. SIGTERM and
/// SIGINT are passed on to it. Blocks; meant to be all that a process does.
///
/// # Errors
/// [`Error::System`] when the worker cannot be started or signals cannot be caught.
pub fn run(worker: impl FnMut() -> Command) -> Result<Ended> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| loam_sys::Error::new("epoll_create", "the holder", error))?;
    runtime.block_on(supervise(worker))
}

/// What is known of one worker when it has ended.
struct Life {
    status: ExitStatus,
    ready: Option<Instant>,
    wanted: bool,
}

impl Life {
    fn was_quick(&self) -> bool {
        self.ready.is_none_or(|ready| ready.elapsed() < QUICK_DEATH)
    }
}

async fn supervise(mut worker: impl FnMut() -> Command) -> Result<Ended> {
    let mut kept = BTreeMap::new();
    let mut quick_deaths = 0;
    let mut served = false;
    loop {
        let life = live(worker(), &mut kept).await?;
        served |= life.ready.is_some();
        let crashed = life.status.code().is_none_or(|code| code == PANIC_STATUS);
        if life.wanted || life.status.success() || (!served && !crashed) {
            return Ok(Ended::Worker(life.status));
        }
        quick_deaths = if life.was_quick() { quick_deaths + 1 } else { 0 };
        tracing::error!(status = %life.status, quick_deaths, "the serving process died: starting it again");
        if quick_deaths >= QUICK_DEATHS_MAX {
            return Ok(Ended::GaveUp { deaths: quick_deaths, last: life.status });
        }
        if quick_deaths > 1 {
            let pause = PAUSE_FIRST * (1 << (quick_deaths - 2).min(16));
            tokio::time::sleep(pause.min(PAUSE_MAX)).await;
        }
    }
}

/// Starts one worker and attends to it until it has ended.
async fn live(mut command: Command, kept: &mut BTreeMap<String, OwnedFd>) -> Result<Life> {
    let fail =
        |call| move |error: std::io::Error| Error::from(loam_sys::Error::new(call, "the holder", error));
    // Before the worker runs: a signal must find somebody who passes it on.
    let mut terminate = signal(SignalKind::terminate()).map_err(fail("sigaction"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail("sigaction"))?;
    let (ours, theirs) = fds::message_pair()?;
    let ours = std::os::unix::net::UnixStream::from(ours);
    ours.set_nonblocking(true).map_err(fail("fcntl"))?;
    let socket = UnixStream::from_std(ours).map_err(fail("epoll_ctl"))?;
    command.env(SOCKET_VARIABLE, format!("{}:{}", theirs.as_raw_fd(), std::process::id()));
    // The holder is who systemd knows; it passes on what matters.
    command.env_remove("NOTIFY_SOCKET").env_remove("FDSTORE");
    inherit(&mut command, vec![theirs], Isolation::default());
    let program = command.get_program().to_string_lossy().into_owned();
    let mut command = tokio::process::Command::from(command);
    let mut child = command.spawn().map_err(|error| loam_sys::Error::new("execve", program, error))?;
    drop(command);
    let pid = child.id().and_then(|pid| Pid::from_raw(pid as i32));
    let mut desk = Desk { kept, ready: None, wanted: false };
    let mut open = true;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status.map_err(fail("waitid"))?,
            result = socket.readable(), if open => {
                result.map_err(fail("epoll_wait"))?;
                open = desk.attend(&socket, |buffer| receive_ready(&socket, buffer));
            }
            _ = terminate.recv() => desk.pass_on(pid, Signal::TERM),
            _ = interrupt.recv() => desk.pass_on(pid, Signal::INT),
        }
    };
    // What it said last, before the next one is told what is kept. It need not have been announced yet.
    desk.attend(&socket, |buffer| fds::receive(&socket, buffer));
    Ok(Life { status, ready: desk.ready, wanted: desk.wanted })
}

/// Receives a message that the runtime says is there; takes note when there is none.
fn receive_ready(socket: &UnixStream, buffer: &mut [u8]) -> loam_sys::Result<(usize, Vec<OwnedFd>)> {
    let attempt = || match fds::receive(socket, buffer) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(error.into()),
        result => Ok(result),
    };
    match socket.try_io(Interest::READABLE, attempt) {
        Ok(result) => result,
        Err(error) => Err(loam_sys::Error::new("recvmsg", "the worker's socket", error)),
    }
}

/// What a worker's messages change.
struct Desk<'a> {
    kept: &'a mut BTreeMap<String, OwnedFd>,
    ready: Option<Instant>,
    wanted: bool,
}

impl Desk<'_> {
    fn pass_on(&mut self, pid: Option<Pid>, signal: Signal) {
        self.wanted = true;
        if let Some(pid) = pid {
            // It may have ended this instant.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Does what all waiting messages say. Returns whether there may come more.
    fn attend(
        &mut self,
        socket: &impl AsFd,
        mut receive: impl FnMut(&mut [u8]) -> loam_sys::Result<(usize, Vec<OwnedFd>)>,
    ) -> bool {
        loop {
            let mut buffer = [0; MESSAGE_MAX];
            match receive(&mut buffer) {
                Ok((0, _)) => return false,
                Ok((length, descriptors)) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    if let Err(error) = self.obey(socket, Message::parse(bytes), descriptors) {
                        tracing::warn!(%error, "cannot answer the serving process");
                        return false;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) => {
                    // One bad message; a broken socket shows as its end.
                    tracing::warn!(%error, "cannot read a message of the serving process");
                    return error.errno() == Some(rustix::io::Errno::MSGSIZE.raw_os_error());
                }
            }
        }
    }

    fn obey(
        &mut self,
        socket: &impl AsFd,
        message: Option<Message<'_>>,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<()> {
        match message {
            Some(Message::Store(name)) => {
                let room = self.kept.len() < STORED_MAX || self.kept.contains_key(name);
                match descriptors.pop() {
                    Some(descriptor) if room => {
                        self.kept.insert(name.to_owned(), descriptor);
                    }
                    _ => {
                        tracing::warn!(name, "a descriptor was not stored: none came, or there are too many")
                    }
                }
            }
            Some(Message::Remove(name)) => {
                self.kept.remove(name);
            }
            Some(Message::Take) => {
                for (name, descriptor) in self.kept.iter() {
                    fds::send(socket, format!("descriptor {name}").as_bytes(), &[descriptor.as_fd()])?;
                }
                fds::send(socket, b"end", &[])?;
            }
            Some(Message::Ready) => {
                self.ready = Some(Instant::now());
                if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
                    tracing::warn!(%error, "cannot tell systemd that the device is served");
                }
            }
            Some(Message::Stop) => self.wanted = true,
            None => tracing::warn!("the serving process sent a message that is not known"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_worker_that_ends_well_ends_the_holder() {
        let ended = run(|| shell("exit 0")).unwrap();
        assert!(matches!(ended, Ended::Worker(status) if status.success()));
    }

    #[test]
    fn a_worker_that_fails_before_it_served_is_not_started_again() {
        let mut starts = 0;
        let ended = run(|| {
            starts += 1;
            shell("exit 3")
        });
        assert!(matches!(ended.unwrap(), Ended::Worker(status) if status.code() == Some(3)));
        assert_eq!(starts, 1);
    }

    #[test]
    fn a_worker_that_crashes_is_started_again() {
        let mut starts = 0;
        let ended = run(|| {
            starts += 1;
            shell(if starts < 4 { "kill -9 $$" } else { "exit 0" })
        });
        assert!(matches!(ended.unwrap(), Ended::Worker(status) if status.success()));
        assert_eq!(starts, 4);
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error() {
        assert!(run(|| Command::new("/does/not/exist")).is_err());
    }

    #[test]
    fn names_replace_each_other_and_their_number_is_bounded() {
        let input = std::io::stdin();
        let mut kept = BTreeMap::new();
        let (ours, theirs) = fds::message_pair().unwrap();
        rustix::fs::fcntl_setfl(&ours, rustix::fs::OFlags::NONBLOCK).unwrap();
        let mut desk = Desk { kept: &mut kept, ready: None, wanted: false };
        for index in 0..STORED_MAX + 4 {
            fds::send(&theirs, format!("store {index}").as_bytes(), &[input.as_fd()]).unwrap();
        }
        fds::send(&theirs, b"store 0", &[input.as_fd()]).unwrap();
        fds::send(&theirs, b"store 1", &[]).unwrap();
        fds::send(&theirs, b"nonsense", &[input.as_fd()]).unwrap();
        fds::send(&theirs, b"remove 2", &[]).unwrap();
        fds::send(&theirs, b"ready", &[]).unwrap();
        assert!(desk.attend(&ours, |buffer| fds::receive(&ours, buffer)));
        assert_eq!((desk.kept.len(), desk.ready.is_some()), (STORED_MAX - 1, true));
        fds::send(&theirs, &[b'x'; 500], &[]).unwrap();
        assert!(desk.attend(&ours, |buffer| fds::receive(&ours, buffer)));
        fds::send(&theirs, b"stop", &[]).unwrap();
        drop(theirs);
        // The message before the end counts.
        assert!(!desk.attend(&ours, |buffer| fds::receive(&ours, buffer)));
        assert!(desk.wanted);
    }
}
