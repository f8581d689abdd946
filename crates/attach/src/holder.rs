//! What lets a served device outlive the process that serves it: somebody else keeps the descriptors.
//!
//! A FUSE connection ends, and every read on it fails, when the last /dev/fuse descriptor is closed. So a tiny process,
//! the *holder*, keeps duplicates of the descriptors that matter, starts the serving process (the *worker*), and starts
//! it again when it dies; the new worker is given the descriptors, asks for what was left unanswered, and readers have
//! merely waited. systemd can play the holder's part (`FileDescriptorStoreMax=`); [`FdStore`] is the worker's side of
//! either.
//!
//! # Protocol
//! Worker and holder talk over a pair of SOCK_SEQPACKET sockets; the worker's end is inherited. `LOAM_HOLDER_FD` has its
//! number and, behind a colon, the holder's process id: what the worker starts inherits the variable, but not the
//! socket, and can tell by its own parent that it is not meant. One message is one line of text, descriptors travel beside it (SCM_RIGHTS):
//!
//! ```text
//! worker: store NAME + 1 descriptor   keep a duplicate (in place of one of the same name)
//!         remove NAME                 close it
//!         take                        send everything that is kept
//!         ready                       started: from here on a death is worth a restart at once
//!         stop                        the end that follows is wanted, whatever its status
//! holder: descriptor NAME + 1         one for each that is kept, in answer to `take`
//!         end                         after the last of them
//! ```

mod store;
mod supervisor;

pub use store::FdStore;
pub use supervisor::{Ended, run};

/// The environment variable with the number of the worker's socket and the holder's process id, "NUMBER:PID".
pub const SOCKET_VARIABLE: &str = "LOAM_HOLDER_FD";
/// The longest name of a descriptor in bytes; names are printable ASCII without space and colon, as systemd wants them.
pub const NAME_MAX: usize = 64;
/// The most descriptors that are kept for one worker.
pub const STORED_MAX: usize = 16;
/// The longest message in bytes.
const MESSAGE_MAX: usize = NAME_MAX + 16;

fn is_name(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_graphic() && byte != b':';
    !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(good)
}

/// A message to the holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Message<'a> {
    Store(&'a str),
    Remove(&'a str),
    Take,
    Ready,
    Stop,
}

impl<'a> Message<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Message<'a>> {
        let text = std::str::from_utf8(bytes).ok()?;
        let named = |prefix| text.strip_prefix(prefix).filter(|name| is_name(name));
        match text {
            "take" => Some(Message::Take),
            "ready" => Some(Message::Ready),
            "stop" => Some(Message::Stop),
            _ => named("store ").map(Message::Store).or_else(|| named("remove ").map(Message::Remove)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_with_good_names_only() {
        assert_eq!(Message::parse(b"store fuse"), Some(Message::Store("fuse")));
        assert_eq!(Message::parse(b"remove loop-1"), Some(Message::Remove("loop-1")));
        assert_eq!(Message::parse(b"take"), Some(Message::Take));
        for bad in ["store ", "store a b", "store a:b", "store \u{e9}", "take x", "", "STOP"] {
            assert_eq!(Message::parse(bad.as_bytes()), None, "{bad}");
        }
        let long = format!("store {}", "n".repeat(NAME_MAX + 1));
        assert_eq!(Message::parse(long.as_bytes()), None);
    }
}
