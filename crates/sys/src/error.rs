//! One error type for every wrapped call: which call, on what, and what the kernel said.

use std::fmt;
use std::io;

/// The result of a wrapped call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A call that the kernel refused.
#[derive(Debug)]
pub struct Error {
    call: &'static str,
    subject: String,
    source: io::Error,
}

impl Error {
    /// `call` is the name of the system call or ioctl, `subject` the path or descriptor it was made on.
    pub fn new(call: &'static str, subject: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error { call, subject: subject.into(), source: source.into() }
    }

    /// The name of the system call or ioctl.
    pub fn call(&self) -> &'static str {
        self.call
    }

    /// The positive errno, where there is one.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// The class of the failure, as `std` knows it.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }

    /// What the user can do about it, where that can be known from the errno alone.
    pub fn hint(&self) -> Option<&'static str> {
        match self.errno()? {
            libc::EPERM | libc::EACCES => Some("this needs root (CAP_SYS_ADMIN)"),
            libc::ENOTTY => {
                Some("the file is not of the kind this call is for (not btrfs, or not a loop device)")
            }
            libc::ENODEV => Some("the kernel lacks this driver or filesystem; is its module loaded?"),
            libc::EBUSY => Some("something still uses it: a mount, an open file, or another process"),
            libc::EOPNOTSUPP => Some("this kernel or filesystem does not support it"),
            libc::EDQUOT => Some("the subvolume is at its quota limit"),
            libc::EMFILE => Some("too many open files: raise the limit (ulimit -n)"),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}: {}", self.call, self.subject, self.source)?;
        match self.hint() {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::new(error.source.kind(), error)
    }
}
