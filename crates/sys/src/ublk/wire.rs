//! The layouts of `include/uapi/linux/ublk_cmd.h`, in host byte order. What the kernel writes is data like any other:
//! no field is trusted to be in range.
//!
//! ```text
//! struct ublksrv_ctrl_cmd, 32 bytes         struct ublksrv_ctrl_dev_info, 64 bytes
//!   0  dev_id u32                             0  nr_hw_queues u16
//!   4  queue_id u16 (0xffff: none)            2  queue_depth u16
//!   6  len u16: bytes at addr                 4  state u16, padding u16
//!   8  addr u64                               8  max_io_buf_bytes u32
//!  16  data u64                              12  dev_id u32
//!  24  dev_path_len u16                      16  ublksrv_pid i32, padding u32
//!  26  padding                               24  flags u64
//!                                            32  ublksrv_flags u64: the server's own
//! struct ublksrv_io_cmd, 16 bytes            40  owner_uid u32, owner_gid u32
//!   0  q_id u16                              48  reserved
//!   2  tag u16
//!   4  result i32                           struct ublksrv_io_desc, 24 bytes
//!   8  addr u64                               0  op_flags u32: operation in the low byte
//!                                             4  nr_sectors u32
//!                                             8  start_sector u64
//!                                            16  addr u64
//! ```

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `UBLK_F_*`: what a driver offers and a device uses.
pub mod feature {
    /// Pages of a request can be registered as a buffer of an io_uring.
    pub const SUPPORT_ZERO_COPY: u64 = 1 << 0;
    /// A device outlives its server.
    pub const USER_RECOVERY: u64 = 1 << 3;
    /// Requests that a server left unanswered are given to the next.
    pub const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    /// Devices for users without CAP_SYS_ADMIN.
    pub const UNPRIVILEGED_DEV: u64 = 1 << 5;
    /// Commands are numbered as ioctls are.
    pub const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    /// Data is moved by reads and writes of the character device.
    pub const USER_COPY: u64 = 1 << 7;
    /// Pages of a request are registered before the server sees it.
    pub const AUTO_BUF_REG: u64 = 1 << 11;
    /// Commands for many requests at once.
    pub const BATCH_IO: u64 = 1 << 15;
    /// `UBLK_U_CMD_TRY_STOP_DEV`: stops a device only when nobody has it open.
    pub const SAFE_STOP_DEV: u64 = 1 << 17;
    /// The kernel looks for no partition table.
    pub const NO_AUTO_PART_SCAN: u64 = 1 << 18;
}

/// `UBLK_S_DEV_*`: what a device is doing.
pub mod state {
    /// Not started, or stopped.
    pub const DEAD: u16 = 0;
    /// Being served.
    pub const LIVE: u16 = 1;
    /// Its server is gone; requests wait for another.
    pub const QUIESCED: u16 = 2;
}

/// `UBLK_IO_OP_*`: what a request asks for.
pub mod operation {
    /// Fill the request's pages.
    pub const READ: u8 = 0;
    /// Take what is in them.
    pub const WRITE: u8 = 1;
    /// Make what was written durable.
    pub const FLUSH: u8 = 2;
    /// Forget a range.
    pub const DISCARD: u8 = 3;
    /// Zero a range.
    pub const WRITE_ZEROES: u8 = 5;
}

/// `UBLK_ATTR_*`: bits of [`Basic::attributes`].
pub mod attribute {
    /// The device takes no writes.
    pub const READ_ONLY: u32 = 1 << 0;
}

/// `UBLK_PARAM_TYPE_*`: which parts of [`Parameters`] count.
pub mod parameter {
    /// [`super::Parameters::basic`].
    pub const BASIC: u32 = 1 << 0;
    /// [`super::Parameters::dma_alignment`].
    pub const DMA_ALIGN: u32 = 1 << 4;
}

/// `UBLK_MAX_QUEUE_DEPTH`: the most requests of one queue.
pub const DEPTH_MAX: u16 = 4096;
/// Where the pages of requests begin in the character device's offsets (`UBLKSRV_IO_BUF_OFFSET`).
const IO_BUFFER_OFFSET: u64 = 0x8000_0000;
const TAG_SHIFT: u32 = 25;
const QUEUE_SHIFT: u32 = TAG_SHIFT + 16;
/// The most bytes of one request (`UBLK_IO_BUF_BITS`).
pub const IO_BYTES_MAX: usize = 1 << TAG_SHIFT;

/// The offset in the character device at which the pages of a request lie.
pub(super) fn io_buffer_offset(queue: u16, tag: u16) -> u64 {
    IO_BUFFER_OFFSET + (u64::from(queue) << QUEUE_SHIFT) + (u64::from(tag) << TAG_SHIFT)
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

const fn number(direction: u32, bytes: usize, nr: u32) -> u32 {
    direction << 30 | (bytes as u32) << 16 | (b'u' as u32) << 8 | nr
}

const fn control(direction: u32, nr: u32) -> u32 {
    number(direction, size_of::<ControlCommand>(), nr)
}

const fn io(nr: u32) -> u32 {
    number(READ_WRITE, size_of::<IoCommand>(), nr)
}

pub(super) const CMD_ADD_DEV: u32 = control(READ_WRITE, 0x04);
pub(super) const CMD_DEL_DEV: u32 = control(READ_WRITE, 0x05);
pub(super) const CMD_START_DEV: u32 = control(READ_WRITE, 0x06);
pub(super) const CMD_STOP_DEV: u32 = control(READ_WRITE, 0x07);
pub(super) const CMD_SET_PARAMS: u32 = control(READ_WRITE, 0x08);
pub(super) const CMD_START_USER_RECOVERY: u32 = control(READ_WRITE, 0x10);
pub(super) const CMD_END_USER_RECOVERY: u32 = control(READ_WRITE, 0x11);
pub(super) const CMD_GET_DEV_INFO2: u32 = control(READ, 0x12);
pub(super) const CMD_GET_FEATURES: u32 = control(READ, 0x13);
pub(super) const CMD_DEL_DEV_ASYNC: u32 = control(READ, 0x14);
pub(super) const CMD_TRY_STOP_DEV: u32 = control(READ_WRITE, 0x17);
pub(super) const IO_FETCH_REQ: u32 = io(0x20);
pub(super) const IO_COMMIT_AND_FETCH_REQ: u32 = io(0x21);

/// `struct ublksrv_ctrl_cmd`.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ControlCommand {
    pub(super) device: u32,
    pub(super) queue: u16,
    pub(super) length: u16,
    pub(super) address: u64,
    pub(super) data: u64,
    pub(super) path_length: u16,
    pub(super) padding: u16,
    pub(super) reserved: u32,
}

/// `struct ublksrv_ctrl_dev_info`: a device, without its parameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfo {
    /// Queues.
    pub queues: u16,
    /// Requests of each queue that may be under way.
    pub depth: u16,
    /// One of [`state`].
    pub state: u16,
    /// Nothing.
    pub padding_0: u16,
    /// The most bytes of one request.
    pub io_bytes_max: u32,
    /// The N of /dev/ublkbN; `u32::MAX` asks for any.
    pub number: u32,
    /// The process that serves, or served last.
    pub server_pid: i32,
    /// Nothing.
    pub padding_1: u32,
    /// Of [`feature`].
    pub flags: u64,
    /// What the server wants kept with the device; the kernel does not look at it.
    pub server_data: u64,
    /// Who made it.
    pub owner_uid: u32,
    /// The group of who made it.
    pub owner_gid: u32,
    /// Nothing.
    pub reserved: [u64; 2],
}

/// `struct ublk_param_basic`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Basic {
    /// Of [`attribute`].
    pub attributes: u32,
    /// The logical block, as a power of two of bytes.
    pub logical_block_shift: u8,
    /// The physical block.
    pub physical_block_shift: u8,
    /// The preferred request.
    pub optimal_io_shift: u8,
    /// The smallest sensible request.
    pub minimum_io_shift: u8,
    /// The longest request, in sectors of 512 bytes.
    pub sectors_max: u32,
    /// Requests do not cross multiples of this many sectors; 0: they may.
    pub chunk_sectors: u32,
    /// Size of the device in sectors of 512 bytes.
    pub sectors: u64,
    /// Bits of memory addresses at which segments must not break.
    pub virtual_boundary_mask: u64,
}

/// `struct ublk_param_dma_align`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaAlignment {
    /// Bits of memory addresses that must be zero.
    pub mask: u32,
    /// Nothing.
    pub padding: u32,
}

/// `struct ublk_params` as far as [`DmaAlignment`]: the kernel takes any length.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Parameters {
    /// Bytes of this struct.
    pub length: u32,
    /// Of [`parameter`].
    pub types: u32,
    /// What every device has.
    pub basic: Basic,
    /// `ublk_param_discard`, `ublk_param_devt`, `ublk_param_zoned`: not used.
    pub unused: [u32; 17],
    /// Alignment of the memory that requests read into.
    pub dma_alignment: DmaAlignment,
    /// Nothing.
    pub padding: u32,
}

/// `struct ublksrv_io_desc`: a request as the kernel describes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoDescriptor {
    /// One of [`operation`] in the low byte, flags above.
    pub operation_flags: u32,
    /// Length in sectors of 512 bytes.
    pub sectors: u32,
    /// Where it begins.
    pub first_sector: u64,
    /// The buffer that the server named.
    pub address: u64,
}

impl IoDescriptor {
    /// One of [`operation`], or something else.
    pub fn operation(&self) -> u8 {
        self.operation_flags as u8
    }
}

/// `struct ublksrv_io_cmd`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IoCommand {
    pub(super) queue: u16,
    pub(super) tag: u16,
    pub(super) result: i32,
    pub(super) address: u64,
}

const _: () = assert!(size_of::<ControlCommand>() == 32);
const _: () = assert!(size_of::<DeviceInfo>() == 64);
const _: () = assert!(size_of::<Basic>() == 32);
const _: () = assert!(size_of::<Parameters>() == 120);
const _: () = assert!(size_of::<IoDescriptor>() == 24);
const _: () = assert!(size_of::<IoCommand>() == 16);

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn fields_lie_where_the_kernel_has_them() {
        assert_eq!(offset_of!(ControlCommand, address), 8);
        assert_eq!(offset_of!(ControlCommand, data), 16);
        assert_eq!(offset_of!(ControlCommand, path_length), 24);
        assert_eq!(offset_of!(DeviceInfo, io_bytes_max), 8);
        assert_eq!(offset_of!(DeviceInfo, server_pid), 16);
        assert_eq!(offset_of!(DeviceInfo, flags), 24);
        assert_eq!(offset_of!(DeviceInfo, server_data), 32);
        assert_eq!(offset_of!(DeviceInfo, owner_uid), 40);
        assert_eq!(offset_of!(Parameters, basic), 8);
        assert_eq!(offset_of!(Parameters, dma_alignment), 8 + 32 + 20 + 16 + 32);
        assert_eq!(offset_of!(Basic, sectors), 16);
        assert_eq!(offset_of!(IoDescriptor, first_sector), 8);
        assert_eq!(offset_of!(IoCommand, address), 8);
    }

    #[test]
    fn command_numbers_are_those_of_the_header() {
        // _IOR('u', 0x13, struct ublksrv_ctrl_cmd), _IOWR('u', 0x04, ..), _IOWR('u', 0x21, struct ublksrv_io_cmd)
        assert_eq!(CMD_GET_FEATURES, 0x8020_7513);
        assert_eq!(CMD_ADD_DEV, 0xc020_7504);
        assert_eq!(IO_COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }

    #[test]
    fn pages_of_requests_do_not_overlap() {
        assert_eq!(io_buffer_offset(0, 0), 0x8000_0000);
        assert_eq!(io_buffer_offset(0, 1) - io_buffer_offset(0, 0), IO_BYTES_MAX as u64);
        assert_eq!(io_buffer_offset(1, 0) - io_buffer_offset(0, u16::MAX), IO_BYTES_MAX as u64);
    }
}
