//! `noextents`: a device that is all data, as far as it says. nbdkit's filter of that name.

use std::sync::Arc;

use super::forward::forward;
use super::parameters::LayerHelp;
use crate::{BlockDevice, Capabilities};

pub(super) static HELP: LayerHelp = LayerHelp {
    name: "noextents",
    summary: "extents are not known: all is data (nbdkit: noextents)",
    parameters: &[],
};

struct NoExtents {
    inner: Arc<dyn BlockDevice>,
}

pub(super) fn wrap(inner: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
    Arc::new(NoExtents { inner })
}

/// `extents` is the trait's own: all data.
impl BlockDevice for NoExtents {
    forward!(inner: geometry, read, write, write_zeroes, trim, flush, locality, prefetch, locate, settle);

    fn capabilities(&self) -> Capabilities {
        Capabilities { extents: false, ..self.inner.capabilities() }
    }
}
