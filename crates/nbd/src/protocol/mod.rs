//! The messages of the protocol: a type for each, parsed from bytes and written to bytes, without any I/O.
