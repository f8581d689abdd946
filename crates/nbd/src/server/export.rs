//! What is said of an export, and what a connection holds it to.

use std::sync::Arc;

use loam_block::{BlockDevice, MAXIMUM_BLOCK};

use super::Export;
use crate::protocol::{
    BASE_ALLOCATION, BlockSizes, ExportTerms, HeaderStyle, InfoItem, InfoRequest, InfoType, LOAM_LOCALITY,
    TransmissionFlags,
};

/// A metadata context that BLOCK_STATUS can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// `base:allocation`: data, zeroes or holes.
    Allocation,
    /// `loam:locality`: local or to be fetched.
    Locality,
}

impl Context {
    /// All that there are, for any export.
    pub(super) const ALL: [Context; 2] = [Context::Allocation, Context::Locality];

    pub(super) fn name(self) -> &'static str {
        match self {
            Context::Allocation => BASE_ALLOCATION,
            Context::Locality => LOAM_LOCALITY,
        }
    }

    /// What BLOCK_STATUS calls it.
    pub(super) fn id(self) -> u32 {
        match self {
            Context::Allocation => 1,
            Context::Locality => 2,
        }
    }
}

/// What option haggling led to.
pub(super) struct Session {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) terms: ExportTerms,
    pub(super) contexts: Vec<Context>,
}

impl Export {
    pub(super) fn block_sizes(&self) -> BlockSizes {
        let geometry = self.device.geometry();
        BlockSizes {
            minimum: geometry.minimum_block,
            preferred: geometry.preferred_block.min(MAXIMUM_BLOCK),
            maximum: geometry.maximum_block.min(MAXIMUM_BLOCK),
        }
        .adjusted()
    }

    /// What goes for a connection that negotiated `style` and, for this export, metadata contexts or none.
    pub(super) fn terms(&self, style: HeaderStyle, contexts: bool) -> ExportTerms {
        let capabilities = self.device.capabilities();
        let writable = capabilities.write && !self.read_only;
        let mut flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_CACHE;
        flags.set(TransmissionFlags::READ_ONLY, !writable);
        flags.set(TransmissionFlags::ROTATIONAL, capabilities.rotational == Some(true));
        flags.set(TransmissionFlags::SEND_TRIM, writable && capabilities.trim);
        flags.set(TransmissionFlags::SEND_WRITE_ZEROES, writable && capabilities.zero);
        let fast_zero = writable && capabilities.zero && capabilities.fast_zero;
        flags.set(TransmissionFlags::SEND_FAST_ZERO, fast_zero);
        flags.set(TransmissionFlags::SEND_DF, style.chunks());
        // What nobody writes to, all connections see alike.
        flags.set(TransmissionFlags::CAN_MULTI_CONN, capabilities.multi_connection || !writable);
        let filter = style == HeaderStyle::Extended && contexts;
        flags.set(TransmissionFlags::BLOCK_STATUS_PAYLOAD, filter);
        let sizes = self.block_sizes();
        ExportTerms {
            size: self.device.geometry().size,
            flags,
            minimum_block: sizes.minimum,
            maximum_payload: sizes.maximum,
            style,
            contexts,
        }
    }

    /// What is told of the export in answer to `request`. Block sizes are told whether or not they were asked for.
    pub(super) fn information(&self, request: &InfoRequest, terms: &ExportTerms) -> Vec<InfoItem> {
        let facts = crate::protocol::ExportFacts { size: terms.size, flags: terms.flags };
        let mut items = vec![InfoItem::Export(facts), InfoItem::BlockSize(self.block_sizes())];
        if request.asks(InfoType::Name) {
            items.push(InfoItem::Name(self.name.clone()));
        }
        if request.asks(InfoType::Description) && !self.description.is_empty() {
            items.push(InfoItem::Description(self.description.clone()));
        }
        items
    }
}
