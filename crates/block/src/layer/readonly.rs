//! `readonly`: a device that refuses whatever would change it.

use std::sync::Arc;

use super::forward::forward;
use super::parameters::LayerHelp;
use crate::{BlockDevice, Capabilities};

pub(super) static HELP: LayerHelp =
    LayerHelp { name: "readonly", summary: "writes, zeroes and trims are refused", parameters: &[] };

struct ReadOnly {
    inner: Arc<dyn BlockDevice>,
}

pub(super) fn wrap(inner: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
    Arc::new(ReadOnly { inner })
}

/// `write`, `write_zeroes` and `trim` are the trait's own: they refuse.
impl BlockDevice for ReadOnly {
    forward!(inner: geometry, read, flush, extents, locality, prefetch, locate, settle);

    fn capabilities(&self) -> Capabilities {
        Capabilities { write: false, trim: false, zero: false, fast_zero: false, ..self.inner.capabilities() }
    }
}
