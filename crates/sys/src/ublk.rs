//! ublk, block devices served from user space (`include/uapi/linux/ublk_cmd.h`, `drivers/block/ublk_drv.c`, Linux 6.0;
//! what is here needs 6.5): [`Control`] makes and removes devices, [`Queue`] takes the requests of one of their queues
//! and answers them. Both are thin: commands go in as entries of an io_uring, and nothing is decided here.

mod control;
mod memory;
mod queue;
mod registered;
mod thread;
mod wire;

pub use control::{CONTROL_PATH, Control, DeviceId};
pub use memory::LentBuffer;
pub use queue::{Event, Queue, QueueOptions, Transfer, Waker};
pub use thread::prefer_batches;
pub use wire::{
    Basic, DEPTH_MAX, DeviceInfo, DmaAlignment, IO_BYTES_MAX, IoDescriptor, Parameters, attribute, feature,
    operation, parameter, state,
};
