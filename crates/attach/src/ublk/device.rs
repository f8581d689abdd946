//! The life of a device: made, started, taken over, stopped, removed. A device that was made but not started goes away
//! again when this is dropped; one that runs stays.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use loam_block::Geometry;
use loam_sys::ublk::{
    Basic, Control, DeviceId, DeviceInfo, DmaAlignment, Parameters, attribute, feature, parameter, state,
};
use rustix::io::Errno;
use uuid::Uuid;

use super::options::{DataPath, Features, Options, SavedState};
use super::server::Server;
use crate::loop_transport::{DETACH_TIMEOUT, check_unused};
use crate::{Error, Result};

/// The longest request. Every tag has a buffer of this size, which becomes resident when a request of that length came:
/// at most 16 MiB for a queue of depth 128. Longer reads are split, and their parts are under way together.
const IO_BYTES_MAX: u32 = 128 << 10;
/// Bytes of a page.
const PAGE: u32 = 4096;
/// The largest device: sizes are signed in the kernel, and its last page must be addressable.
const SIZE_MAX: u64 = i64::MAX as u64 - 4095;
/// Bits of memory addresses that must be zero with zero copy, where files are read into readers' own memory: the
/// alignment that O_DIRECT reads of ordinary disks want.
const DMA_MASK: u32 = 511;
/// How long the process that served before may take to be gone.
const RESUME_TIMEOUT: Duration = Duration::from_secs(10);
/// How long udev may take to give a new device to the user who made it.
const ACCESS_TIMEOUT: Duration = Duration::from_secs(5);
/// Between looks at what another process does.
const POLL: Duration = Duration::from_millis(1);

/// Opens the driver and asks what it offers.
pub(super) fn open() -> Result<(Control, Features)> {
    let unavailable = |error: loam_sys::Error| {
        let hint = match (error.call(), error.kind()) {
            ("open", std::io::ErrorKind::PermissionDenied) => {
                "this needs root, or a udev rule that gives access to /dev/ublk-control"
            }
            ("open", _) => {
                "load the driver (modprobe ublk_drv); Linux has it from 6.0 on, if it was configured"
            }
            ("io_uring_setup", _) => "io_uring is switched off: see the sysctl kernel.io_uring_disabled",
            _ => "this needs Linux 6.5",
        };
        Error::Unavailable { transport: "ublk", why: error.to_string(), hint }
    };
    let mut control = Control::open().map_err(unavailable)?;
    let features = Features(control.features().map_err(unavailable)?);
    Ok((control, features))
}

/// "/dev/ublkbN".
pub(super) fn path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{number}"))
}

/// The device of an attachment, if it is still there.
pub(super) fn find(control: &mut Control, state: &SavedState) -> Result<Option<DeviceInfo>> {
    Ok(control.info(state.number)?.filter(|info| info.server_data == state.id))
}

/// The device that was made as `id`, whatever its number.
pub(super) fn find_by_id(mut control: Control, id: u64) -> Result<Option<SavedState>> {
    // Absent when there has been no device since the driver was loaded.
    let entries = std::fs::read_dir("/sys/class/ublk-char").into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    for number in names.filter_map(|name| name.strip_prefix("ublkc")?.parse().ok()) {
        if let Some(info) = control.info(number)?.filter(|info| info.server_data == id) {
            return Ok(Some(Device::new(control, &info, 0)?.state().clone()));
        }
    }
    Ok(None)
}

/// Removes what is left of an attachment, unless it is in use.
pub(super) fn remove(mut control: Control, state: &SavedState) -> Result<bool> {
    let Some(info) = find(&mut control, state)? else { return Ok(false) };
    let id = DeviceId { number: state.number, unprivileged: info.flags & feature::UNPRIVILEGED_DEV != 0 };
    stop_unused(&mut control, id, info.flags)?;
    delete(&mut control, id, state)?;
    Ok(true)
}

/// A device in our hands.
pub(super) struct Device {
    control: Control,
    id: DeviceId,
    /// What it was made with, of [`feature`].
    flags: u64,
    state: SavedState,
    /// Made by us and not started yet.
    is_draft: bool,
    is_gone: bool,
}

impl Device {
    /// Makes a device like `geometry` and sets it up.
    pub(super) fn add(
        mut control: Control,
        features: Features,
        geometry: &Geometry,
        options: &Options,
    ) -> Result<Device> {
        check_geometry(geometry, options.block_size)?;
        let data_path = options.data_path.resolve(features, options.unprivileged)?;
        let wanted = [
            feature::CMD_IOCTL_ENCODE | feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE,
            feature::NO_AUTO_PART_SCAN | feature::SAFE_STOP_DEV,
            if options.unprivileged { feature::UNPRIVILEGED_DEV } else { 0 },
        ];
        let wanted = wanted.iter().fold(0, |all, flags| all | flags) & features.0;
        let mut info = DeviceInfo {
            queues: options.queues(),
            depth: options.depth(),
            io_bytes_max: io_bytes_max(geometry),
            number: u32::MAX,
            server_pid: pid(),
            flags: wanted | data_path.flags(),
            server_data: options.id.unwrap_or_else(new_id),
            ..DeviceInfo::default()
        };
        control.add(&mut info)?;
        let mut device = Device::new(control, &info, geometry.size)?;
        device.is_draft = true;
        device.wait_for_access()?;
        let parameters = parameters(geometry, options.block_size, info.io_bytes_max, device.state.data_path);
        device.control.set_parameters(device.id, &parameters)?;
        Ok(device)
    }

    /// The device of an attachment whose process is gone, or about to be.
    pub(super) fn found(mut control: Control, state: SavedState) -> Result<Device> {
        let gone = || Error::Mismatch(format!("{} is not that attachment", path(state.number).display()));
        let info = find(&mut control, &state)?.ok_or_else(gone)?;
        Device::new(control, &info, state.size)
    }

    fn new(control: Control, info: &DeviceInfo, size: u64) -> Result<Device> {
        let unprivileged = info.flags & feature::UNPRIVILEGED_DEV != 0;
        let has = |path: DataPath| info.flags & path.flags() == path.flags();
        let data_path = [DataPath::ZeroCopy, DataPath::UserCopy].into_iter().find(|path| has(*path));
        let state = SavedState {
            id: info.server_data,
            number: info.number,
            size,
            queues: info.queues,
            depth: info.depth,
            data_path: data_path.unwrap_or(DataPath::Copy),
            io_bytes_max: info.io_bytes_max,
            unprivileged,
        };
        let id = DeviceId { number: info.number, unprivileged };
        let flags = info.flags;
        let (is_draft, is_gone) = (false, false);
        Ok(Device { control, id, flags, state, is_draft, is_gone })
    }

    /// The kernel checks the permissions of the character device of an unprivileged device with each command, and udev
    /// sets them when it has heard of it.
    fn wait_for_access(&self) -> Result<()> {
        let path = self.id.server_path();
        let wanted = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
        let end = Instant::now() + ACCESS_TIMEOUT;
        let access = || if self.id.unprivileged { rustix::fs::access(path.as_str(), wanted) } else { Ok(()) };
        while let Err(error) = access() {
            if Instant::now() >= end {
                return Err(loam_sys::Error::new("access", path, error).into());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Starts a device whose queues have threads.
    pub(super) fn start(mut self, server: &Server) -> Result<Device> {
        server.begin(self.open_server()?)?;
        self.control.start(self.id, pid())?;
        self.is_draft = false;
        Ok(self)
    }

    /// Takes over a device, when the process that served before is gone, for queues that have threads. Between readying
    /// it and serving it as little is done as can be: a process that dies there may not be followed by another.
    pub(super) fn take_over(mut self, server: &Server) -> Result<Device> {
        let end = Instant::now() + RESUME_TIMEOUT;
        let file = loop {
            let readied = self.control.start_recovery(self.id);
            let opened = match readied {
                Ok(()) => self.open_server(),
                // Readied already, by a process that died before it served (kernels before 6.16 say so).
                Err(error) if error.errno() == Some(Errno::INVAL.raw_os_error()) && self.is_quiesced()? => {
                    self.open_server()
                }
                Err(error) => Err(error),
            };
            match opened {
                Ok(file) => break file,
                Err(error) if error.errno() != Some(Errno::BUSY.raw_os_error()) => return Err(error.into()),
                Err(_) if Instant::now() < end => std::thread::sleep(POLL),
                Err(_) => return Err(self.still_served()?),
            }
        };
        server.begin(file)?;
        self.control.end_recovery(self.id, pid())?;
        Ok(self)
    }

    fn is_quiesced(&mut self) -> loam_sys::Result<bool> {
        Ok(self.control.info(self.id.number)?.is_some_and(|info| info.state == state::QUIESCED))
    }

    fn still_served(&mut self) -> loam_sys::Result<Error> {
        let pid = self.control.info(self.id.number)?.map_or(0, |info| info.server_pid);
        Ok(Error::Mismatch(format!("{} is still served by process {pid}", path(self.id.number).display())))
    }

    /// Opens the character device; one process at a time can.
    fn open_server(&self) -> loam_sys::Result<OwnedFd> {
        let path = self.id.server_path();
        // Else io_uring takes writes to it for ones that block, and hands each to a worker thread.
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let opened = File::options().read(true).write(true).custom_flags(flags).open(&path);
        opened.map(OwnedFd::from).map_err(|error| loam_sys::Error::new("open", path, error))
    }

    pub(super) fn state(&self) -> &SavedState {
        &self.state
    }

    /// Stops and removes the device, unless it is in use.
    pub(super) fn detach(&mut self, server: &mut Server) -> Result<()> {
        if !self.is_gone {
            if find(&mut self.control, &self.state)?.is_some() {
                stop_unused(&mut self.control, self.id, self.flags)?;
            }
            self.is_gone = true;
        }
        if !server.wait(DETACH_TIMEOUT) {
            return Err(Error::StillOpen { device: path(self.id.number) });
        }
        delete(&mut self.control, self.id, &self.state)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.is_draft {
            // Threads that wait with it for its start end by this.
            let _ = self.control.stop(self.id);
            if let Err(error) = request_delete(&mut self.control, self.id) {
                tracing::warn!(%error, "a device that could not be started is left over");
            }
        }
    }
}

fn pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

fn new_id() -> u64 {
    let (high, low) = Uuid::new_v4().as_u64_pair();
    high ^ low
}

/// Stops a device that nobody uses.
fn stop_unused(control: &mut Control, id: DeviceId, flags: u64) -> Result<()> {
    let path = path(id.number);
    let end = Instant::now() + DETACH_TIMEOUT;
    loop {
        if !is_used(&path)? {
            return Ok(());
        }
        let stopped = match flags & feature::SAFE_STOP_DEV {
            0 => stop_held(control, id, &path)?,
            _ => match control.try_stop(id) {
                Ok(()) => true,
                Err(error) => match error.errno().map(Errno::from_raw_os_error) {
                    Some(Errno::BUSY) => false,
                    Some(Errno::NODEV) => true,
                    _ => return Err(error.into()),
                },
            },
        };
        if stopped {
            return Ok(());
        }
        // Transient openers (udev's probes) go away by themselves.
        if Instant::now() >= end {
            return Err(Error::StillOpen { device: path });
        }
        std::thread::sleep(POLL);
    }
}

/// Whether there is a block device to stop; fails when it is mounted or held.
fn is_used(path: &Path) -> Result<bool> {
    match check_unused(path) {
        Ok(()) => Ok(true),
        Err(Error::System(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(Error::System(error)) if error.errno() == Some(Errno::NXIO.raw_os_error()) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Stops a device that nobody has open, where the kernel does not look itself. It is held exclusively meanwhile, so that
/// it cannot be mounted. Returns false when it is open.
fn stop_held(control: &mut Control, id: DeviceId, path: &Path) -> Result<bool> {
    let exclusive = rustix::fs::OFlags::EXCL.bits() as i32;
    let held = match OpenOptions::new().read(true).custom_flags(exclusive).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
            return Err(Error::Busy { device: path.to_owned() });
        }
        Err(error) => return Err(loam_sys::Error::new("open", path.display().to_string(), error).into()),
    };
    if is_open_elsewhere(path, &held) {
        return Ok(false);
    }
    control.stop(id)?;
    Ok(true)
}

/// Whether any process has `path` open, by another descriptor than `held`.
fn is_open_elsewhere(path: &Path, held: &File) -> bool {
    let own = format!("/proc/{}/fd/{}", pid(), held.as_raw_fd());
    let list =
        |path: PathBuf| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    list("/proc".into())
        .filter(|process| process.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit()))
        .flat_map(|process| list(process.join("fd")))
        .any(|fd| {
            fd.as_os_str() != own.as_str() && std::fs::read_link(&fd).is_ok_and(|target| target == path)
        })
}

/// Removes a device that is stopped, and waits until it is gone.
fn delete(control: &mut Control, id: DeviceId, state: &SavedState) -> Result<()> {
    request_delete(control, id)?;
    let end = Instant::now() + DETACH_TIMEOUT;
    while find(control, state)?.is_some() {
        if Instant::now() >= end {
            return Err(Error::StillOpen { device: path(id.number) });
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn request_delete(control: &mut Control, id: DeviceId) -> Result<()> {
    // The kernel knows no owner's right to the other command.
    let result = if id.unprivileged { control.delete(id) } else { control.delete_later(id) };
    match result {
        Err(error) if error.errno() == Some(Errno::NODEV.raw_os_error()) => Ok(()),
        other => Ok(other?),
    }
}

/// Whether a device can be served with that block size.
fn check_geometry(geometry: &Geometry, block_size: u32) -> Result<()> {
    let Geometry { size, minimum_block, maximum_block, .. } = *geometry;
    if !matches!(block_size, 512 | 1024 | 2048 | 4096) {
        let why = format!("blocks of {block_size} bytes: the kernel takes 512, 1024, 2048 and 4096");
        return Err(Error::Unsuitable(why));
    }
    if size == 0 || size > SIZE_MAX || !size.is_multiple_of(u64::from(block_size)) {
        let limits = format!("from 1 to {SIZE_MAX} and a multiple of {block_size}");
        return Err(Error::Unsuitable(format!("the size of {size} bytes is not {limits}")));
    }
    if minimum_block > block_size || maximum_block < PAGE {
        let blocks = format!("{minimum_block} to {maximum_block} bytes at a time");
        return Err(Error::Unsuitable(format!(
            "the device is read {blocks}, the kernel reads {block_size} to {PAGE}"
        )));
    }
    Ok(())
}

fn io_bytes_max(geometry: &Geometry) -> u32 {
    geometry.maximum_block.min(IO_BYTES_MAX) / PAGE * PAGE
}

fn parameters(geometry: &Geometry, block_size: u32, io_bytes_max: u32, data_path: DataPath) -> Parameters {
    let shift = |bytes: u32| bytes.trailing_zeros() as u8;
    let basic = Basic {
        attributes: attribute::READ_ONLY,
        logical_block_shift: shift(block_size),
        physical_block_shift: shift(PAGE),
        optimal_io_shift: shift(PAGE),
        minimum_io_shift: shift(PAGE),
        sectors_max: io_bytes_max / 512,
        sectors: geometry.size / 512,
        ..Basic::default()
    };
    let mut parameters = Parameters {
        length: size_of::<Parameters>() as u32,
        types: parameter::BASIC,
        basic,
        ..Parameters::default()
    };
    if data_path == DataPath::ZeroCopy {
        parameters.types |= parameter::DMA_ALIGN;
        parameters.dma_alignment = DmaAlignment { mask: DMA_MASK, padding: 0 };
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(size: u64) -> Geometry {
        Geometry { size, minimum_block: 1, preferred_block: 4096, maximum_block: 32 << 20 }
    }

    #[test]
    fn sizes_that_the_kernel_cannot_have_are_refused() {
        for size in [4096, 1 << 40, (7 << 60) + (1 << 40)] {
            check_geometry(&geometry(size), 4096).unwrap();
        }
        for size in [0, 4095, 512, 1 << 63, u64::MAX - 4095] {
            assert!(matches!(check_geometry(&geometry(size), 4096), Err(Error::Unsuitable(_))), "{size}");
        }
        check_geometry(&geometry(512), 512).unwrap();
        assert!(check_geometry(&geometry(1 << 20), 8192).is_err());
        assert!(check_geometry(&Geometry { minimum_block: 8192, ..geometry(1 << 20) }, 4096).is_err());
    }

    #[test]
    fn requests_are_whole_pages_and_bounded() {
        assert_eq!(io_bytes_max(&geometry(4096)), IO_BYTES_MAX);
        let small = Geometry { maximum_block: 8192 + 512, ..geometry(4096) };
        assert_eq!(io_bytes_max(&small), 8192);
        let parameters = parameters(&geometry(7 << 60), 4096, 8192, DataPath::Copy);
        assert_eq!((parameters.basic.sectors_max, parameters.basic.sectors), (16, 7 << 51));
        assert_eq!(parameters.basic.attributes, attribute::READ_ONLY);
    }

    #[test]
    fn open_devices_are_seen() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = File::open(file.path()).unwrap();
        // The temporary file's own handle is open too.
        assert!(is_open_elsewhere(file.path(), &first));
        let (path, handle) = (file.path().to_owned(), file.into_temp_path());
        assert!(!is_open_elsewhere(&path, &first));
        drop(handle);
    }
}
