//! How the thread of a queue is scheduled.

use crate::{Error, Result};

/// Lets the calling thread run when others have done what they do, rather than in between (SCHED_BATCH): a thread that
/// is woken by each of many requests then finds them all at once.
///
/// # Errors
/// `EPERM` where a resource limit or a sandbox forbids it.
pub fn prefer_batches() -> Result<()> {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads one struct sched_param, which lives here; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &parameter) };
    if result < 0 {
        return Err(Error::new("sched_setscheduler", "this thread", std::io::Error::last_os_error()));
    }
    Ok(())
}
