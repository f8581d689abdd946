//! Control commands: to make a device, set it up, start it, take it over, stop and remove it. Each is one entry of 128
//! bytes on a ring of its own, waited for at once.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use zerocopy::{FromZeros, IntoBytes};

use super::wire::{self, ControlCommand, DeviceInfo, Parameters};
use crate::{Error, Result};

/// The device that control commands go to.
pub const CONTROL_PATH: &str = "/dev/ublk-control";
/// The queue number of commands that are not about a queue.
const NO_QUEUE: u16 = u16::MAX;

/// Which device a command is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceId {
    /// The N of /dev/ublkbN.
    pub number: u32,
    /// Whether it was made with [`wire::feature::UNPRIVILEGED_DEV`]: its commands carry the path of the character
    /// device, whose permissions the kernel then checks.
    pub unprivileged: bool,
}

impl DeviceId {
    /// The character device that its server opens.
    pub fn server_path(self) -> String {
        format!("/dev/ublkc{}", self.number)
    }
}

/// Where control commands are given. Each call waits until its command is done.
pub struct Control {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    device: OwnedFd,
}

/// What a command carries besides its number.
#[derive(Default)]
struct Payload {
    bytes: Vec<u8>,
    data: u64,
    path: Option<String>,
}

impl Control {
    /// Opens the driver.
    ///
    /// # Errors
    /// `ENOENT` where the driver is not there, `EACCES` without permission; `EPERM`, `ENOSYS` from io_uring_setup where
    /// io_uring is switched off.
    pub fn open() -> Result<Control> {
        let device = File::options().read(true).write(true).open(CONTROL_PATH);
        let device = device.map_err(|error| Error::new("open", CONTROL_PATH, error))?;
        let ring =
            IoUring::builder().build(2).map_err(|error| Error::new("io_uring_setup", CONTROL_PATH, error))?;
        Ok(Control { ring, device: device.into() })
    }

    /// What the driver offers, of [`wire::feature`].
    ///
    /// # Errors
    /// `EOPNOTSUPP` from kernels before 6.5.
    pub fn features(&mut self) -> Result<u64> {
        let mut payload = Payload { bytes: vec![0; size_of::<u64>()], ..Payload::default() };
        self.command("UBLK_CMD_GET_FEATURES", wire::CMD_GET_FEATURES, u32::MAX, &mut payload)?;
        Ok(payload.bytes.try_into().map_or(0, u64::from_ne_bytes))
    }

    /// Makes a device. `info` comes back with its number and with what the driver made of the other wishes.
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_ADMIN, unless it is to be an unprivileged one; `EINVAL` for wishes that do not go together.
    pub fn add(&mut self, info: &mut DeviceInfo) -> Result<()> {
        let mut payload = Payload { bytes: info.as_bytes().to_vec(), ..Payload::default() };
        self.command("UBLK_CMD_ADD_DEV", wire::CMD_ADD_DEV, info.number, &mut payload)?;
        info.as_mut_bytes().copy_from_slice(&payload.bytes);
        Ok(())
    }

    /// Sets the parameters of a device that is not started.
    ///
    /// # Errors
    /// `EINVAL` for parameters that the kernel does not take.
    pub fn set_parameters(&mut self, device: DeviceId, parameters: &Parameters) -> Result<()> {
        let bytes = parameters.as_bytes().to_vec();
        self.on_device("UBLK_CMD_SET_PARAMS", wire::CMD_SET_PARAMS, device, bytes, 0).map(drop)
    }

    /// Starts a device that process `pid` serves; waits until each of its queues has fetched with every tag, and answers
    /// the reads that look for partitions.
    ///
    /// # Errors
    /// `EEXIST` when it is started already.
    pub fn start(&mut self, device: DeviceId, pid: i32) -> Result<()> {
        let (name, command) = ("UBLK_CMD_START_DEV", wire::CMD_START_DEV);
        self.on_device(name, command, device, Vec::new(), pid as u64).map(drop)
    }

    /// Stops a device, whoever has it open. What is mounted on it fails from then on.
    ///
    /// # Errors
    /// `ENODEV` when it is not there.
    pub fn stop(&mut self, device: DeviceId) -> Result<()> {
        self.on_device("UBLK_CMD_STOP_DEV", wire::CMD_STOP_DEV, device, Vec::new(), 0).map(drop)
    }

    /// Stops a device that nobody has open ([`wire::feature::SAFE_STOP_DEV`]).
    ///
    /// # Errors
    /// `EBUSY` when somebody has.
    pub fn try_stop(&mut self, device: DeviceId) -> Result<()> {
        self.on_device("UBLK_CMD_TRY_STOP_DEV", wire::CMD_TRY_STOP_DEV, device, Vec::new(), 0).map(drop)
    }

    /// Stops and removes a device, and waits until its last user has closed it, which may be never. Unprivileged ones
    /// have no other way.
    ///
    /// # Errors
    /// `ENODEV` when it is not there.
    pub fn delete(&mut self, device: DeviceId) -> Result<()> {
        self.on_device("UBLK_CMD_DEL_DEV", wire::CMD_DEL_DEV, device, Vec::new(), 0).map(drop)
    }

    /// Stops and removes a device; it goes away with its last user.
    ///
    /// # Errors
    /// `ENODEV` when it is not there.
    pub fn delete_later(&mut self, device: DeviceId) -> Result<()> {
        self.on_device("UBLK_CMD_DEL_DEV_ASYNC", wire::CMD_DEL_DEV_ASYNC, device, Vec::new(), 0).map(drop)
    }

    /// A device as the kernel has it; `None` when there is none of that number.
    ///
    /// # Errors
    /// `EPERM`, `EACCES` when it is somebody else's.
    pub fn info(&mut self, number: u32) -> Result<Option<DeviceInfo>> {
        // Always with the path: for this command the kernel asks for it whoever made the device.
        let device = DeviceId { number, unprivileged: true };
        let bytes = vec![0; size_of::<DeviceInfo>()];
        match self.on_device("UBLK_CMD_GET_DEV_INFO2", wire::CMD_GET_DEV_INFO2, device, bytes, 0) {
            Ok(bytes) => {
                let mut info = DeviceInfo::new_zeroed();
                info.as_mut_bytes().copy_from_slice(&bytes);
                Ok(Some(info))
            }
            Err(error) if matches!(error.errno(), Some(libc::ENODEV | libc::ENOENT)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Readies a device whose server is gone for another.
    ///
    /// # Errors
    /// `EBUSY` while the old one is not wholly gone; `EINVAL` for devices that cannot be taken over, and for those that
    /// are ready for it already.
    pub fn start_recovery(&mut self, device: DeviceId) -> Result<()> {
        let (name, command) = ("UBLK_CMD_START_USER_RECOVERY", wire::CMD_START_USER_RECOVERY);
        self.on_device(name, command, device, Vec::new(), 0).map(drop)
    }

    /// Goes on with a device whose queues process `pid` serves from now on; waits until each of them has fetched with
    /// every tag.
    ///
    /// # Errors
    /// `EBUSY` when it was not readied.
    pub fn end_recovery(&mut self, device: DeviceId, pid: i32) -> Result<()> {
        let (name, command) = ("UBLK_CMD_END_USER_RECOVERY", wire::CMD_END_USER_RECOVERY);
        self.on_device(name, command, device, Vec::new(), pid as u64).map(drop)
    }

    fn on_device(
        &mut self,
        name: &'static str,
        command: u32,
        device: DeviceId,
        bytes: Vec<u8>,
        data: u64,
    ) -> Result<Vec<u8>> {
        let path = device.unprivileged.then(|| device.server_path());
        let mut payload = Payload { bytes, data, path };
        self.command(name, command, device.number, &mut payload)?;
        Ok(payload.bytes)
    }

    /// Gives one command and waits for it. The payload's bytes go in and come back.
    fn command(
        &mut self,
        name: &'static str,
        number: u32,
        device: u32,
        payload: &mut Payload,
    ) -> Result<i32> {
        let fail = |error: std::io::Error| Error::new(name, format!("ublk device {}", device as i32), error);
        let prefix = payload.path.take().map_or(Vec::new(), |path| [path.as_bytes(), &[0]].concat());
        let mut buffer = [&prefix, &*payload.bytes].concat();
        let invalid = |_| std::io::Error::from_raw_os_error(libc::EINVAL);
        let command = ControlCommand {
            device,
            queue: NO_QUEUE,
            length: buffer.len().try_into().map_err(invalid).map_err(fail)?,
            address: if buffer.is_empty() { 0 } else { buffer.as_mut_ptr().expose_provenance() as u64 },
            data: payload.data,
            path_length: prefix.len() as u16,
            padding: 0,
            reserved: 0,
        };
        let mut bytes = [0; 80];
        for (place, byte) in bytes.iter_mut().zip(command.as_bytes()) {
            *place = *byte;
        }
        let entry = opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), number).cmd(bytes).build();
        let mut submissions = self.ring.submission();
        // SAFETY: the entry names `buffer`, with its length, and the descriptor: both stay until the completion is
        // here, else the buffer is leaked below.
        let pushed = unsafe { submissions.push(&entry) };
        drop(submissions);
        pushed.map_err(|_| fail(std::io::Error::from_raw_os_error(libc::EBUSY)))?;
        let result = loop {
            if let Some(completion) = self.ring.completion().next() {
                break completion.result();
            }
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    // The kernel may have taken the command and write into the buffer yet.
                    std::mem::forget(buffer);
                    return Err(fail(error));
                }
                _ => {}
            }
        };
        if result < 0 {
            return Err(fail(std::io::Error::from_raw_os_error(-result)));
        }
        payload.bytes = buffer.split_off(prefix.len());
        Ok(result)
    }
}
