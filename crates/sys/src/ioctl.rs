//! The two shapes of ioctl that the other modules need: with a pointer to a plain struct, and with an integer.
//! Request numbers of the first kind carry the size of their struct, so a wrong layout cannot compile into a call that
//! overruns it: the kernel takes the size from the number (`include/uapi/asm-generic/ioctl.h`).

use std::os::fd::{AsRawFd, BorrowedFd};

use zerocopy::{FromBytes, IntoBytes};

use crate::{Error, Result};

/// Direction bits of a request number: the kernel reads the struct.
pub(crate) const WRITE: u32 = 1;
/// Direction bits of a request number: the kernel writes the struct.
pub(crate) const READ: u32 = 2;

/// A request whose argument is a pointer to a `T`, and the name it goes by in errors.
pub(crate) struct Request<T> {
    name: &'static str,
    number: u32,
    argument: std::marker::PhantomData<fn(T)>,
}

impl<T> Request<T> {
    /// The number `_IOC(direction, magic, nr, sizeof(T))`.
    pub(crate) const fn sized(name: &'static str, direction: u32, magic: u8, nr: u8) -> Self {
        assert!(size_of::<T>() < 1 << 14, "an ioctl number has 14 bits for the size");
        let number = direction << 30 | (size_of::<T>() as u32) << 16 | (magic as u32) << 8 | nr as u32;
        Request { name, number, argument: std::marker::PhantomData }
    }

    /// A number from before sizes were part of it (loop).
    ///
    /// # Safety
    /// The request must read and write no more than `size_of::<T>()` bytes at its argument.
    pub(crate) const unsafe fn unsized_number(name: &'static str, number: u32) -> Self {
        Request { name, number, argument: std::marker::PhantomData }
    }
}

impl<T: FromBytes + IntoBytes> Request<T> {
    /// Makes the call; `argument` is in and out. `describe` names the subject, for the error only.
    pub(crate) fn call(
        &self,
        fd: BorrowedFd<'_>,
        argument: &mut T,
        describe: impl FnOnce() -> String,
    ) -> Result<i32> {
        let pointer: *mut T = argument;
        // SAFETY: the request touches at most size_of::<T>() bytes (its number says so, or its constructor's caller
        // promised), `pointer` is valid for that long and exclusively borrowed, and T allows every bit pattern.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), self.number as _, pointer) };
        if result < 0 {
            return Err(Error::new(self.name, describe(), std::io::Error::last_os_error()));
        }
        Ok(result)
    }
}

/// Makes a request whose argument is an integer, or nothing (0).
pub(crate) fn call_integer(
    name: &'static str,
    number: u32,
    fd: BorrowedFd<'_>,
    argument: libc::c_ulong,
    describe: impl FnOnce() -> String,
) -> Result<i32> {
    // SAFETY: the callers' requests take an integer by value: no memory of ours is touched.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, argument) };
    if result < 0 {
        return Err(Error::new(name, describe(), std::io::Error::last_os_error()));
    }
    Ok(result)
}

/// The number `_IO(magic, nr)` of a request without a struct.
pub(crate) const fn plain(magic: u8, nr: u8) -> u32 {
    (magic as u32) << 8 | nr as u32
}

/// How an error names a descriptor: its path as /proc knows it, else its number.
pub(crate) fn describe(fd: BorrowedFd<'_>) -> String {
    let number = fd.as_raw_fd();
    match std::fs::read_link(format!("/proc/self/fd/{number}")) {
        Ok(path) => path.display().to_string(),
        Err(_) => format!("descriptor {number}"),
    }
}
