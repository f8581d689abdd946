//! Requests of the transmission phase, and whether an export takes them.

use zerocopy::transmute;

use super::option::codes;
use super::wire::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, RawExtendedRequest, RawRequest, Reader};
use super::{CommandFlags, HeaderStyle, NbdError, ProtocolError, STATUS_FILTER_MAX, TransmissionFlags};

codes! {
    /// What a request wants (NBD_CMD_*).
    Command: u16 {
        /// Read data.
        Read = 0,
        /// Write the data that follows.
        Write = 1,
        /// End the session; has no reply.
        Disconnect = 2,
        /// Make what was written survive power loss.
        Flush = 3,
        /// The data is no longer needed.
        Trim = 4,
        /// The data will soon be read.
        Cache = 5,
        /// Write zeroes that are not sent.
        WriteZeroes = 6,
        /// What lies there, in the metadata contexts that were set.
        BlockStatus = 7,
    }
}

/// The header of a request. Nothing in it has been judged but its magic number: see [`ExportTerms::check`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// How it is to be done, with bits that this side does not know.
    pub flags: CommandFlags,
    /// What is to be done.
    pub command: Command,
    /// The client's name for it; returned as it came.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes of the export, or of the payload: [`Request::payload_length`].
    pub length: u64,
}

impl Request {
    /// Bytes of a compact header.
    pub const COMPACT_LENGTH: usize = size_of::<RawRequest>();
    /// Bytes of an extended header.
    pub const EXTENDED_LENGTH: usize = size_of::<RawExtendedRequest>();

    /// Reads a compact header.
    ///
    /// # Errors
    /// [`ProtocolError::Magic`].
    #[inline]
    pub fn parse_compact(bytes: [u8; Self::COMPACT_LENGTH]) -> Result<Self, ProtocolError> {
        let raw: RawRequest = transmute!(bytes);
        if raw.magic.get() != REQUEST_MAGIC {
            return Err(ProtocolError::Magic { what: "a request", found: raw.magic.get().into() });
        }
        Ok(Request {
            flags: CommandFlags::from_bits_retain(raw.flags.get()),
            command: Command::from_code(raw.command.get()),
            cookie: raw.cookie.get(),
            offset: raw.offset.get(),
            length: raw.length.get().into(),
        })
    }

    /// Reads an extended header.
    ///
    /// # Errors
    /// [`ProtocolError::Magic`].
    #[inline]
    pub fn parse_extended(bytes: [u8; Self::EXTENDED_LENGTH]) -> Result<Self, ProtocolError> {
        let raw: RawExtendedRequest = transmute!(bytes);
        if raw.magic.get() != EXTENDED_REQUEST_MAGIC {
            return Err(ProtocolError::Magic { what: "an extended request", found: raw.magic.get().into() });
        }
        Ok(Request {
            flags: CommandFlags::from_bits_retain(raw.flags.get()),
            command: Command::from_code(raw.command.get()),
            cookie: raw.cookie.get(),
            offset: raw.offset.get(),
            length: raw.length.get(),
        })
    }

    /// The bytes of a compact header; `None` where the length does not fit 32 bits.
    pub fn encode_compact(&self) -> Option<[u8; Self::COMPACT_LENGTH]> {
        Some(transmute!(RawRequest {
            magic: REQUEST_MAGIC.into(),
            flags: self.flags.bits().into(),
            command: self.command.code().into(),
            cookie: self.cookie.into(),
            offset: self.offset.into(),
            length: u32::try_from(self.length).ok()?.into(),
        }))
    }

    /// The bytes of an extended header.
    pub fn encode_extended(&self) -> [u8; Self::EXTENDED_LENGTH] {
        transmute!(RawExtendedRequest {
            magic: EXTENDED_REQUEST_MAGIC.into(),
            flags: self.flags.bits().into(),
            command: self.command.code().into(),
            cookie: self.cookie.into(),
            offset: self.offset.into(),
            length: self.length.into(),
        })
    }

    /// Bytes that follow the header, whatever becomes of the request. Any number until it was compared with what the
    /// server takes.
    ///
    /// With extended headers the specification wants PAYLOAD_LEN on every write, but qemu's client (8.2 to 10.0 at least)
    /// does not set it and sends its data all the same; no client sends a write without data. So a write has its payload
    /// with and without the flag, as qemu's own server takes it.
    #[inline]
    pub fn payload_length(&self, style: HeaderStyle) -> u64 {
        let said = style == HeaderStyle::Extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        let follows = said || self.command == Command::Write;
        if follows { self.length } else { 0 }
    }
}

/// What a request is judged by: the export as it was advertised on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportTerms {
    /// Of the export, in bytes.
    pub size: u64,
    /// What was advertised.
    pub flags: TransmissionFlags,
    /// Offsets and lengths must be multiples of this power of two.
    pub minimum_block: u32,
    /// The longest payload, in bytes.
    pub maximum_payload: u32,
    /// The headers in use.
    pub style: HeaderStyle,
    /// Whether a metadata context was chosen.
    pub contexts: bool,
}

impl ExportTerms {
    /// Whether the export takes this request. The effect length of a BLOCK_STATUS with a payload is inside the payload:
    /// [`ExportTerms::check_range`] when that was read.
    ///
    /// # Errors
    /// The error that the specification names for the first rule that is broken: who may (EPERM), which command and
    /// flags, how long a payload, and where.
    #[inline]
    pub fn check(&self, request: &Request) -> Result<(), NbdError> {
        if request.command == Command::Disconnect {
            return Ok(());
        }
        self.check_command(request.command)?;
        self.check_flags(request)?;
        match request.command {
            Command::Flush if request.offset != 0 || request.length != 0 => return Err(NbdError::Invalid),
            Command::Flush => return Ok(()),
            Command::BlockStatus if request.flags.contains(CommandFlags::PAYLOAD_LEN) => return Ok(()),
            Command::Write if request.length > self.maximum_payload.into() => return Err(NbdError::Invalid),
            _ => {}
        }
        self.check_range(request.command, request.offset, request.length)?;
        if request.command == Command::Read && request.length > self.maximum_payload.into() {
            // The specification keeps EOVERFLOW for clients that can have heard of it.
            let heard = self.flags.contains(TransmissionFlags::SEND_DF);
            return Err(if heard { NbdError::Overflow } else { NbdError::Invalid });
        }
        Ok(())
    }

    fn check_command(&self, command: Command) -> Result<(), NbdError> {
        let needs = match command {
            Command::Write | Command::Trim | Command::WriteZeroes
                if self.flags.contains(TransmissionFlags::READ_ONLY) =>
            {
                return Err(NbdError::NotPermitted);
            }
            Command::Read | Command::Write | Command::Disconnect => TransmissionFlags::empty(),
            Command::Flush => TransmissionFlags::SEND_FLUSH,
            Command::Trim => TransmissionFlags::SEND_TRIM,
            Command::Cache => TransmissionFlags::SEND_CACHE,
            Command::WriteZeroes => TransmissionFlags::SEND_WRITE_ZEROES,
            Command::BlockStatus if self.contexts => TransmissionFlags::empty(),
            Command::BlockStatus | Command::Other(_) => return Err(NbdError::Invalid),
        };
        if self.flags.contains(needs) { Ok(()) } else { Err(NbdError::Invalid) }
    }

    fn check_flags(&self, request: &Request) -> Result<(), NbdError> {
        let mut allowed = CommandFlags::empty();
        let mut allow = |flag: CommandFlags, condition: bool| {
            if condition {
                allowed |= flag;
            }
        };
        let has = |flag: TransmissionFlags| self.flags.contains(flag);
        let extended = self.style == HeaderStyle::Extended;
        allow(CommandFlags::FUA, has(TransmissionFlags::SEND_FUA));
        match request.command {
            Command::Read => allow(CommandFlags::DF, has(TransmissionFlags::SEND_DF)),
            Command::Write => allow(CommandFlags::PAYLOAD_LEN, extended),
            Command::WriteZeroes => {
                allow(CommandFlags::NO_HOLE, true);
                allow(CommandFlags::FAST_ZERO, has(TransmissionFlags::SEND_FAST_ZERO));
            }
            Command::BlockStatus => {
                allow(CommandFlags::REQ_ONE, true);
                let payload = extended && has(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
                allow(CommandFlags::PAYLOAD_LEN, payload);
            }
            _ => {}
        }
        if !(request.flags - allowed).is_empty() { Err(NbdError::Invalid) } else { Ok(()) }
    }

    /// Whether `length` bytes at `offset` lie inside the export and on its blocks.
    ///
    /// # Errors
    /// ENOSPC for what would be written beyond the end, EINVAL for everything else.
    #[inline]
    pub fn check_range(&self, command: Command, offset: u64, length: u64) -> Result<(), NbdError> {
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(match command {
                Command::Write | Command::WriteZeroes => NbdError::NoSpace,
                _ => NbdError::Invalid,
            });
        }
        let mask = u64::from(self.minimum_block.max(1)) - 1;
        if (offset | length) & mask == 0 { Ok(()) } else { Err(NbdError::Invalid) }
    }
}

/// The payload of a BLOCK_STATUS: which contexts it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusFilter {
    /// Bytes of the export that the client is interested in.
    pub length: u64,
    /// Ids of contexts, none of them twice.
    pub contexts: Vec<u32>,
}

impl StatusFilter {
    /// The longest payload, in bytes; a longer one is read, forgotten and answered with EINVAL.
    pub const LENGTH_MAX: usize = 8 + 4 * STATUS_FILTER_MAX;

    /// Reads a payload. Whether the ids were negotiated is for the server to say.
    ///
    /// # Errors
    /// EINVAL for a length that is not 8 + n * 4, more than [`STATUS_FILTER_MAX`] ids, or one given twice.
    pub fn parse(payload: &[u8]) -> Result<Self, NbdError> {
        if payload.len() > Self::LENGTH_MAX || !payload.len().is_multiple_of(4) {
            return Err(NbdError::Invalid);
        }
        let mut reader = Reader::new(payload);
        let length = reader.u64().ok_or(NbdError::Invalid)?;
        let mut contexts = Vec::new();
        while let Some(id) = reader.u32() {
            if contexts.contains(&id) {
                return Err(NbdError::Invalid);
            }
            contexts.push(id);
        }
        Ok(StatusFilter { length, contexts })
    }

    /// The bytes of this payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.length.to_be_bytes().to_vec();
        self.contexts.iter().for_each(|id| out.extend_from_slice(&id.to_be_bytes()));
        out
    }
}
