//! What can go wrong in a pool: what was tried on what, why it failed, and a hint at what to do.

use std::path::PathBuf;

/// The result of a pool operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed pool operation. `Display` is "what: why"; [`Error::hint`] says what to do where that is known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no pool in this directory.
    #[error("{}: no pool here", .0.display())]
    NoPool(PathBuf),
    /// There is one already.
    #[error("{}: there is a pool here already", .0.display())]
    PoolExists(PathBuf),
    /// Written by a newer loam.
    #[error("{}: pool format {found} is newer than this loam knows ({known})", path.display())]
    NewerFormat {
        /// The pool's configuration file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format that this build reads.
        known: u32,
    },
    /// A file of the pool does not parse.
    #[error("{}: {why}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another daemon holds the pool.
    #[error("{}: another daemon has this pool open", .0.display())]
    Locked(PathBuf),
    /// The pool is not up.
    #[error("{}: the pool is not up", .0.display())]
    NotUp(PathBuf),
    /// A mounted filesystem cannot be unmounted.
    #[error("{}: busy{}", path.display(), describe_holders(holders))]
    Busy {
        /// The mount point.
        path: PathBuf,
        /// Who keeps it busy, as far as `/proc` tells.
        holders: Vec<crate::Holder>,
    },
    /// No image, container or range of this name.
    #[error("{name}: no such {kind}")]
    NotFound {
        /// "image", "container", "image or container".
        kind: &'static str,
        /// The name that was given.
        name: String,
    },
    /// The name is taken.
    #[error("{name}: there is {kind} of this name already")]
    Exists {
        /// "an image", "a container".
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// An image still has containers.
    #[error("{name}: still used by {}", containers.join(", "))]
    InUse {
        /// The image.
        name: String,
        /// Its containers.
        containers: Vec<String>,
    },
    /// Arguments that cannot be right.
    #[error("{what}: {why}")]
    Invalid {
        /// The argument.
        what: String,
        /// Why it cannot be right.
        why: String,
    },
    /// The daemon said no; its own words.
    #[error("{message}")]
    Daemon {
        /// What and why, as the daemon put it.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The daemon went away or answers nonsense.
    #[error("daemon of {}: {why}", pool.display())]
    Control {
        /// The pool.
        pool: PathBuf,
        /// What happened on the control socket.
        why: String,
    },
    /// The work was stopped by the user.
    #[error("{0}: interrupted")]
    Interrupted(String),
    /// A step of an operation failed below: "what" names the step and its object.
    #[error("{what}: {source}")]
    Step {
        /// What was tried on what.
        what: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// What to do, where that is known.
        hint: Option<String>,
    },
}

impl Error {
    /// A failed step.
    pub fn step(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error::Step { what: what.into(), source: source.into(), hint: None }
    }

    /// An impossible argument.
    pub fn invalid(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Invalid { what: what.into(), why: why.into() }
    }

    /// A mount that cannot go, with whoever uses it.
    pub(crate) fn busy(mount: &std::path::Path) -> Self {
        Error::Busy { path: mount.to_owned(), holders: crate::busy::holders(mount) }
    }

    /// The same error with advice.
    pub fn with_hint(self, advice: impl Into<String>) -> Self {
        match self {
            Error::Step { what, source, .. } => Error::Step { what, source, hint: Some(advice.into()) },
            other => other,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::NoPool(path) => format!("make one with: loam --pool {} init", path.display()),
            Error::PoolExists(_) => "choose another directory with --pool, or remove this one first".into(),
            Error::NewerFormat { .. } => "use a newer loam for this pool".into(),
            Error::Locked(_) => "loam status shows it; loam down stops it".into(),
            Error::NotUp(path) => format!("start it with: loam --pool {} up", path.display()),
            Error::Busy { .. } => "end what uses it, then try again".into(),
            Error::NotFound { .. } => "loam ls lists what there is".into(),
            Error::Exists { .. } => "choose another name, or remove it with loam rm".into(),
            Error::InUse { .. } => "remove the containers first (loam rm NAME)".into(),
            Error::Control { .. } => "its log is run/daemon.log in the pool; loam down cleans up".into(),
            Error::Daemon { hint, .. } | Error::Step { hint, .. } => return hint.clone(),
            Error::BadFile { .. } | Error::Invalid { .. } | Error::Interrupted(_) => return None,
        })
    }

    /// The error and every cause below it that adds something, in one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.contains(&more) {
                text.push_str(": ");
                text.push_str(&more);
            }
            cause = error.source();
        }
        text
    }
}

fn describe_holders(holders: &[crate::Holder]) -> String {
    if holders.is_empty() {
        return String::new();
    }
    let names: Vec<String> = holders.iter().take(8).map(ToString::to_string).collect();
    let more = holders.len().saturating_sub(8);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!(": used by {}{tail}", names.join(", "))
}

/// Adds "what was tried on what" to errors of other crates.
pub(crate) trait Context<T> {
    /// Wraps the error in a step named by `what`.
    fn step(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::step(what(), error))
    }
}
