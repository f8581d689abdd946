//! The server: exports of [`loam_block::BlockDevice`]s, for any number of connections.
