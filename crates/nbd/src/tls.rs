//! TLS of both sides: certificates, keys and whom to trust, from files as the other NBD tools lay them out.
