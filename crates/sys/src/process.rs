//! Starting a helper process with exactly the descriptors it is meant to have, and what a process that serves block
//! I/O asks of the kernel for itself.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::Signal;

use crate::{Error, Result};

/// How a child is set apart from its parent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Isolation {
    /// Give it a session of its own: no controlling terminal, not reached by the terminal's signals.
    pub new_session: bool,
    /// The signal it gets when the parent thread that started it ends.
    pub parent_death_signal: Option<Signal>,
}

/// Makes `command` pass on `descriptors` (under the numbers they have here) and close every other one but standard
/// input, output and error. The descriptors stay open here as long as `command` exists.
pub fn inherit(command: &mut Command, descriptors: Vec<OwnedFd>, isolation: Isolation) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        // Before anything is let through: whatever else is open goes away at exec.
        // SAFETY: close_range with CLOSE_RANGE_CLOEXEC only sets a flag on descriptors; memory is not touched.
        let closed =
            unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
        if closed != 0 {
            return Err(std::io::Error::last_os_error());
        }
        for descriptor in &descriptors {
            rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty())?;
        }
        if isolation.new_session {
            rustix::process::setsid()?;
        }
        if let Some(signal) = isolation.parent_death_signal {
            rustix::process::set_parent_process_death_signal(Some(signal))?;
            // The parent may have gone before the signal was asked for.
            if rustix::process::getppid() != Some(parent) {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: it neither allocates nor takes locks (an
    // error is built from an errno alone), as `pre_exec` demands.
    unsafe { command.pre_exec(prepare) };
}

/// Marks this process as one that block I/O depends on (PR_SET_IO_FLUSHER), so that its allocations do not wait for
/// writeback that waits for it. Needs CAP_SYS_RESOURCE; doing without is a small risk under memory pressure.
///
/// # Errors
/// `EPERM` without that capability.
pub fn become_io_flusher() -> Result<()> {
    rustix::process::configure_io_flusher_behavior(true)
        .map_err(|error| Error::new("PR_SET_IO_FLUSHER", "this process", error))
}

/// Takes over a descriptor that the process inherited under a known number (from an environment variable), and makes
/// it close-on-exec.
///
/// Each number may be taken once: the caller must be the code that owns the protocol by which it was passed.
///
/// # Errors
/// `EBADF` when nothing is open under that number, `EINVAL` for standard input, output and error.
pub fn take_inherited(number: i32) -> Result<OwnedFd> {
    let describe = || format!("descriptor {number}");
    if number <= 2 {
        return Err(Error::new("fcntl", describe(), std::io::Error::from_raw_os_error(libc::EINVAL)));
    }
    // SAFETY: F_GETFD takes no pointer and fails with EBADF where nothing is open.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(Error::new("fcntl", describe(), std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is open (checked above) and, by the protocol, nobody else's in this process.
    let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(number) };
    rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::CLOEXEC)
        .map_err(|error| Error::new("fcntl", describe(), error))?;
    debug_assert_eq!(fd.as_raw_fd(), number);
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_child_gets_the_descriptors_it_is_given_and_no_others() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let other = UnixStream::pair().unwrap();
        // Not close-on-exec: only `inherit` keeps it from the child.
        rustix::io::fcntl_setfd(&other.0, rustix::io::FdFlags::empty()).unwrap();
        let number = theirs.as_raw_fd();
        let script = format!("echo hello >&{number}; ls /proc/self/fd >&{number}");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]);
        inherit(
            &mut command,
            vec![theirs.into()],
            Isolation { new_session: true, parent_death_signal: None },
        );
        let mut child = command.spawn().unwrap();
        drop(command);
        ours.flush().unwrap();
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success());
        assert!(text.starts_with("hello\n"), "{text}");
        assert!(!text.lines().any(|line| line == other.0.as_raw_fd().to_string()), "{text}");
    }

    #[test]
    fn standard_streams_and_closed_numbers_cannot_be_taken() {
        assert_eq!(take_inherited(1).unwrap_err().errno(), Some(libc::EINVAL));
        assert_eq!(take_inherited(1_000_000).unwrap_err().errno(), Some(libc::EBADF));
    }
}
