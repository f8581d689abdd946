//! Clients that lie, stall, flood or never heard of the protocol, against the real server; and the specification, rule by
//! rule, against its answers. `PROPTEST_CASES` sets how many spoilt sessions are tried.

mod hostile;
#[path = "hostile/server_options.rs"]
mod options;
#[path = "hostile/server_requests.rs"]
mod requests;
#[path = "hostile/session.rs"]
mod session;
#[path = "hostile/server_spoilt.rs"]
mod spoilt;
#[path = "hostile/server_tls.rs"]
mod tls;
