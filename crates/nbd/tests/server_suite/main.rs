//! The server as a client sees it: each option and command by its bytes, over a socket pair.

mod files;
mod limits;
mod options;
mod peer;
mod requests;
mod sessions;
mod tls;
