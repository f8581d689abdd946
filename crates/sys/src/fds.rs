//! Passing descriptors to another process over a Unix socket (SCM_RIGHTS, unix(7)), a bounded number with a bounded
//! message.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::{Error, Result, ioctl};

/// The most descriptors in one message.
pub const MAX_DESCRIPTORS: usize = 8;

/// Sends `message` (at least one byte) with `descriptors` in one piece. The socket keeps duplicates: the caller's
/// descriptors stay its own.
///
/// # Errors
/// `EINVAL` for an empty message or more than [`MAX_DESCRIPTORS`]; `EPIPE` when the other end is gone.
pub fn send(socket: impl AsFd, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let fail = |error: rustix::io::Errno| Error::new("sendmsg", ioctl::describe(socket.as_fd()), error);
    if message.is_empty() || descriptors.len() > MAX_DESCRIPTORS {
        return Err(fail(rustix::io::Errno::INVAL));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(fail(rustix::io::Errno::INVAL));
    }
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket.as_fd(), &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL)
    })
    .map_err(fail)?;
    if sent != message.len() {
        return Err(fail(rustix::io::Errno::MSGSIZE));
    }
    Ok(())
}

/// Receives one message into `buffer` with the descriptors that came with it, all close-on-exec. 0 bytes: the other
/// end is gone.
///
/// # Errors
/// `EMSGSIZE` when the message or the descriptors were cut off; what came of them is closed.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>)> {
    let fail = |error: rustix::io::Errno| Error::new("recvmsg", ioctl::describe(socket.as_fd()), error);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })
    .map_err(fail)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(fail(rustix::io::Errno::MSGSIZE));
    }
    Ok((received.bytes, descriptors))
}

/// A pair of connected sockets that keep messages apart (SOCK_SEQPACKET), both close-on-exec.
///
/// # Errors
/// `EMFILE` and the like.
pub fn message_pair() -> Result<(OwnedFd, OwnedFd)> {
    rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| Error::new("socketpair", "AF_UNIX", error))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (left, right) = message_pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        send(&left, b"store", &[file.as_fd(), left.as_fd()]).unwrap();
        let mut buffer = [0; 64];
        let (length, mut descriptors) = receive(&right, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], descriptors.len()), (&b"store"[..], 2));
        let mut received = std::fs::File::from(descriptors.remove(0));
        received.rewind().unwrap();
        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
    }

    #[test]
    fn a_message_that_does_not_fit_is_an_error_and_a_closed_end_is_zero_bytes() {
        let (left, right) = message_pair().unwrap();
        send(&left, b"too long", &[]).unwrap();
        assert_eq!(receive(&right, &mut [0; 3]).unwrap_err().errno(), Some(libc::EMSGSIZE));
        assert_eq!(send(&left, b"", &[]).unwrap_err().errno(), Some(libc::EINVAL));
        drop(left);
        assert_eq!(receive(&right, &mut [0; 3]).unwrap().0, 0);
    }
}
