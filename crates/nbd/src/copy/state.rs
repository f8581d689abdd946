//! The state file: where a copy that was stopped goes on. `docs/formats/copy-state.md` has its lines.
//!
//! It is replaced, never changed: written beside itself, made durable, renamed. So it is the old one or the new one after
//! a crash at any point, and both tell the truth, because the destination was flushed before.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use super::error::CopyError;

/// First line.
const MAGIC: &str = "loam-copy-state 1";
/// A state file is no longer than this: two identities and three numbers.
const BYTES_MAX: u64 = 64 << 10;

/// Which device, as far as it can be told apart from others.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct End {
    pub(super) identity: Option<String>,
    pub(super) size: u64,
}

/// What a state file says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct State {
    pub(super) source: End,
    pub(super) destination: End,
    /// Bytes from the start that are copied and flushed.
    pub(super) done: u64,
}

impl State {
    fn encode(&self) -> Result<String, serde_json::Error> {
        let body = format!("{MAGIC}\n{}\n", serde_json::to_string(self)?);
        let sum = crc32c::crc32c(body.as_bytes());
        Ok(format!("{body}{sum:08x}\n"))
    }

    fn decode(text: &str) -> Result<State, &'static str> {
        const DAMAGED: &str = "it is damaged: remove it, and the copy begins anew";
        let body = text.strip_suffix('\n').and_then(|text| text.rfind('\n')).map(|at| &text[..=at]);
        let (Some(body), true) = (body, text.starts_with("loam-copy-state ")) else {
            return Err("it is no state file of a copy: name another, or remove it");
        };
        if text[body.len()..] != format!("{:08x}\n", crc32c::crc32c(body.as_bytes())) {
            return Err(DAMAGED);
        }
        let Some(json) = body.strip_prefix(MAGIC).and_then(|rest| rest.strip_prefix('\n')) else {
            return Err("it is of a later version of loam: use that one, or remove it");
        };
        let state: State = serde_json::from_str(json).map_err(|_| DAMAGED)?;
        if state.done > state.source.size { Err(DAMAGED) } else { Ok(state) }
    }

    /// What `path` says; `None` where there is no such file.
    pub(super) fn load(path: &Path) -> Result<Option<State>, CopyError> {
        let io = |source| failed(path, "cannot be read", Some(source));
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(io)?,
        };
        let mut text = String::new();
        let read = file.take(BYTES_MAX + 1).read_to_string(&mut text);
        match read {
            Err(error) if error.kind() != ErrorKind::InvalidData => return Err(io(error)),
            Ok(length) if length as u64 <= BYTES_MAX => {}
            _ => text.clear(),
        }
        State::decode(&text).map(Some).map_err(|why| failed(path, why, None))
    }

    /// Replaces `path`, durably.
    pub(super) fn store(&self, path: &Path) -> Result<(), CopyError> {
        let io = |source| failed(path, "cannot be written", Some(source));
        let text = self.encode().map_err(|source| io(source.into()))?;
        let beside = beside(path);
        let written = File::create(&beside).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| std::fs::rename(&beside, path)).map_err(io)?;
        sync_directory(path).map_err(io)
    }

    /// Removes `path`: the copy is done.
    pub(super) fn remove(path: &Path) -> Result<(), CopyError> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(failed(path, "cannot be removed", Some(error)))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a state of other devices than those of `now`.
    pub(super) fn check_ends(&self, now: &State, path: &Path) -> Result<(), CopyError> {
        let ends =
            [("source", &self.source, &now.source), ("destination", &self.destination, &now.destination)];
        for (side, was, is) in ends {
            if was != is {
                let name = |end: &End| end.identity.clone().unwrap_or_else(|| "unnamed".to_owned());
                let why = format!(
                    "it is of another copy: its {side} was {} of {} bytes and is {} of {} bytes; \
                     remove it to copy from the start",
                    name(was),
                    was.size,
                    name(is),
                    is.size
                );
                return Err(failed(path, why, None));
            }
        }
        Ok(())
    }
}

fn failed(path: &Path, why: impl Into<String>, source: Option<std::io::Error>) -> CopyError {
    CopyError::State { path: path.to_owned(), why: why.into(), source }
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> State {
        let end = |name: &str| End { identity: Some(name.to_owned()), size: 1000 };
        State { source: end("file:/a"), destination: end("nbd://b/\n"), done: 512 }
    }

    #[test]
    fn what_is_stored_is_loaded() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("state");
        assert_eq!(State::load(&path).expect("no file"), None);
        state().store(&path).expect("stored");
        let later = State { done: 1000, ..state() };
        later.store(&path).expect("replaced");
        assert_eq!(State::load(&path).expect("loaded"), Some(later));
        assert_eq!(std::fs::read_dir(directory.path()).expect("directory").count(), 1);
        State::remove(&path).expect("removed");
        State::remove(&path).expect("nothing to remove");
    }

    #[test]
    fn other_ends_are_refused() {
        let path = Path::new("state");
        state().check_ends(&state(), path).expect("the same ends");
        let mut other = state();
        other.destination.size += 1;
        let error = state().check_ends(&other, path).expect_err("another size").to_string();
        assert!(error.contains("destination") && error.contains("1001"), "{error}");
        other = state();
        other.source.identity = None;
        assert!(state().check_ends(&other, path).is_err());
    }

    #[test]
    fn what_is_no_state_file_is_refused() {
        let why = |text: &str| State::decode(text).expect_err("refused");
        assert!(why("").contains("no state file"));
        assert!(why("\n").contains("no state file"));
        let text = state().encode().expect("encodes");
        assert!(why(&text.replace("512", "513")).contains("damaged"));
        let body = "loam-copy-state 2\n{}\n";
        let later = format!("{body}{:08x}\n", crc32c::crc32c(body.as_bytes()));
        assert!(why(&later).contains("later version"));
        let beyond = State { done: 1001, ..state() }.encode().expect("encodes");
        assert!(why(&beyond).contains("damaged"));
    }

    proptest! {
        #[test]
        fn a_changed_byte_is_found(at in 0usize..200, bit in 0u8..7) {
            let mut bytes = state().encode().expect("encodes").into_bytes();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            if let Ok(text) = String::from_utf8(bytes) {
                prop_assert!(State::decode(&text).is_err());
            }
        }
    }
}
