//! The first words: the server's greeting, the client's flags, and the answer to EXPORT_NAME.

use zerocopy::{IntoBytes, transmute};

use super::wire::{GREETING_MAGIC, OLD_STYLE_MAGIC, OPTION_MAGIC, RawExportName, RawGreeting};
use super::{ClientFlags, HandshakeFlags, ProtocolError, TransmissionFlags};

/// What a newstyle server says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// What it offers.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Bytes on the wire.
    pub const LENGTH: usize = size_of::<RawGreeting>();

    /// Reads a greeting. An oldstyle server is recognised by these same first bytes, of the 152 that it sends.
    ///
    /// # Errors
    /// [`ProtocolError::Magic`] and [`ProtocolError::OldStyle`].
    pub fn parse(bytes: [u8; Self::LENGTH]) -> Result<Self, ProtocolError> {
        let raw: RawGreeting = transmute!(bytes);
        if raw.magic.get() != GREETING_MAGIC {
            return Err(ProtocolError::Magic { what: "the greeting", found: raw.magic.get() });
        }
        match raw.style.get() {
            OPTION_MAGIC => Ok(Greeting { flags: HandshakeFlags::from_bits_retain(raw.flags.get()) }),
            OLD_STYLE_MAGIC => Err(ProtocolError::OldStyle),
            found => Err(ProtocolError::Magic { what: "the greeting's second half", found }),
        }
    }

    /// The bytes of this greeting.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        transmute!(RawGreeting {
            magic: GREETING_MAGIC.into(),
            style: OPTION_MAGIC.into(),
            flags: self.flags.bits().into(),
        })
    }
}

impl ClientFlags {
    /// Bytes on the wire.
    pub const LENGTH: usize = 4;

    /// Reads the client's answer to a greeting that offered `offered`.
    ///
    /// # Errors
    /// [`ProtocolError::ClientFlags`] for flags that are unknown or were not offered: the server must close.
    pub fn parse(bytes: [u8; Self::LENGTH], offered: HandshakeFlags) -> Result<Self, ProtocolError> {
        let flags = ClientFlags::from_bits_retain(u32::from_be_bytes(bytes));
        if flags.bits() & !u32::from(offered.bits()) != 0 {
            return Err(ProtocolError::ClientFlags { bits: flags.bits() });
        }
        Ok(flags)
    }

    /// The bytes of these flags.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        self.bits().to_be_bytes()
    }
}

/// The whole answer to EXPORT_NAME; the transmission phase follows at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportNameReply {
    /// Of the export, in bytes.
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
}

impl ExportNameReply {
    /// Bytes on the wire, without the zeroes that may follow.
    pub const LENGTH: usize = size_of::<RawExportName>();
    /// The zeroes that follow unless both sides agreed on NO_ZEROES, in bytes.
    pub const ZEROES: usize = 124;

    /// Reads the answer; whether [`ExportNameReply::ZEROES`] bytes follow is known from the flags of both sides. Their
    /// content is not for the client to judge.
    pub fn parse(bytes: [u8; Self::LENGTH]) -> Self {
        let raw: RawExportName = transmute!(bytes);
        ExportNameReply { size: raw.size.get(), flags: TransmissionFlags::from_bits_retain(raw.flags.get()) }
    }

    /// Appends the answer, with the zeroes unless the client took [`ClientFlags::NO_ZEROES`].
    pub fn encode(self, client: ClientFlags, out: &mut Vec<u8>) {
        let raw = RawExportName { size: self.size.into(), flags: self.flags.bits().into() };
        out.extend_from_slice(raw.as_bytes());
        if !client.contains(ClientFlags::NO_ZEROES) {
            out.extend_from_slice(&[0; Self::ZEROES]);
        }
    }
}
