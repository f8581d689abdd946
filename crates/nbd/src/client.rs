//! The client: an export of a server as a [`loam_block::BlockDevice`].
