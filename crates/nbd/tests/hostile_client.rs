//! Servers that lie, stall, flood or never heard of the protocol, against the real client. `PROPTEST_CASES` sets how many
//! spoilt sessions are tried.

#[path = "hostile/client_handshake.rs"]
mod handshake;
mod hostile;
#[path = "hostile/liar.rs"]
mod liar;
#[path = "hostile/client_replies.rs"]
mod replies;
#[path = "hostile/client_spoilt.rs"]
mod spoilt;
