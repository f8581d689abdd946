//! The copier: from any [`loam_block::BlockDevice`] to any other, without doing slow work twice.
