//! Replies to options.

use zerocopy::{IntoBytes, transmute};

use super::error::REPLY_ERROR;
use super::wire::{OPTION_REPLY_MAGIC, RawOptionReply, Reader};
use super::{
    InfoType, OPTION_REPLY_MAX, OptionCode, ProtocolError, Refusal, RefusalKind, TransmissionFlags, text,
};

/// What precedes the data of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered, as the client sent it.
    pub option: OptionCode,
    /// Type of the reply, as on the wire.
    pub kind: u32,
    /// Of its data, in bytes; at most [`OPTION_REPLY_MAX`].
    pub length: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const LENGTH: usize = size_of::<RawOptionReply>();

    /// Reads the header of a reply to `option`.
    ///
    /// # Errors
    /// [`ProtocolError::Magic`]; [`ProtocolError::Length`] beyond [`OPTION_REPLY_MAX`]; [`ProtocolError::Content`] when
    /// another option is answered: a client has only one at a time.
    pub fn parse(bytes: [u8; Self::LENGTH], option: OptionCode) -> Result<Self, ProtocolError> {
        let raw: RawOptionReply = transmute!(bytes);
        if raw.magic.get() != OPTION_REPLY_MAGIC {
            return Err(ProtocolError::Magic { what: "a reply to an option", found: raw.magic.get() });
        }
        let length = raw.length.get();
        if length > OPTION_REPLY_MAX {
            return Err(ProtocolError::Length { what: "a reply to an option", length: length.into() });
        }
        if raw.option.get() != option.code() {
            return Err(ProtocolError::Content {
                what: "a reply to an option",
                why: "it answers an option that was not sent",
            });
        }
        Ok(OptionReplyHeader { option, kind: raw.kind.get(), length })
    }
}

/// Size constraints of an export, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this power of two, at most 65,536.
    pub minimum: u32,
    /// Requests that cause no read-modify-write; a power of two.
    pub preferred: u32,
    /// The longest payload of a request.
    pub maximum: u32,
}

impl BlockSizes {
    /// What goes when nothing was said: any alignment, and 32 MiB.
    pub const DEFAULT: BlockSizes = BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 };

    /// The least that a preferred size may be.
    const PREFERRED_MIN: u32 = 512;
    /// The most that a minimum may be.
    const MINIMUM_MAX: u32 = 1 << 16;

    /// Whether the values are such that a client can live with them. The specification wants `preferred` to be at least
    /// 512 and at most `maximum` as well: a server sends no others ([`BlockSizes::adjusted`]), a client does not mind.
    fn usable(self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= Self::MINIMUM_MAX
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum
            && self.maximum >= self.minimum
    }

    /// The same, made to keep all rules that the specification has for a server.
    pub fn adjusted(self) -> Self {
        let floor = |value: u32| 1 << value.max(1).ilog2();
        let minimum = floor(self.minimum).min(Self::MINIMUM_MAX);
        let preferred = floor(self.preferred).max(minimum).max(Self::PREFERRED_MIN);
        BlockSizes { minimum, preferred, maximum: self.maximum.max(preferred) }
    }
}

/// What INFO_EXPORT says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportFacts {
    /// Of the export, in bytes.
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
}

/// One piece of information on an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InfoItem {
    /// Size and flags.
    Export(ExportFacts),
    /// The canonical name.
    Name(String),
    /// For a human.
    Description(String),
    /// Size constraints.
    BlockSize(BlockSizes),
    /// One that this side does not know, and must ignore.
    Other(u16),
}

impl InfoItem {
    fn parse(data: &[u8]) -> Result<Self, ProtocolError> {
        let length = data.len() as u64;
        let wrong = || ProtocolError::Length { what: "an information reply", length };
        let mut reader = Reader::new(data);
        let kind = InfoType::from_code(reader.u16().ok_or_else(wrong)?);
        let fixed = |expected: u64| if length == expected { Ok(()) } else { Err(wrong()) };
        Ok(match kind {
            InfoType::Export => {
                fixed(12)?;
                let size = reader.u64().ok_or_else(wrong)?;
                let flags = TransmissionFlags::from_bits_retain(reader.u16().ok_or_else(wrong)?);
                InfoItem::Export(ExportFacts { size, flags })
            }
            InfoType::Name => InfoItem::Name(name(reader.rest(), "the export's canonical name")?),
            InfoType::Description => InfoItem::Description(text::message(reader.rest())),
            InfoType::BlockSize => {
                fixed(14)?;
                let mut next = || reader.u32().ok_or_else(wrong);
                let sizes = BlockSizes { minimum: next()?, preferred: next()?, maximum: next()? };
                if !sizes.usable() {
                    return Err(ProtocolError::Content {
                        what: "block sizes",
                        why: "minimum and preferred must be powers of two, minimum at most 65536 and the smallest",
                    });
                }
                InfoItem::BlockSize(sizes)
            }
            InfoType::Other(code) => InfoItem::Other(code),
        })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let kind = match self {
            InfoItem::Export(_) => InfoType::Export,
            InfoItem::Name(_) => InfoType::Name,
            InfoItem::Description(_) => InfoType::Description,
            InfoItem::BlockSize(_) => InfoType::BlockSize,
            InfoItem::Other(code) => InfoType::Other(*code),
        };
        out.extend_from_slice(&kind.code().to_be_bytes());
        match self {
            InfoItem::Export(facts) => {
                out.extend_from_slice(&facts.size.to_be_bytes());
                out.extend_from_slice(&facts.flags.bits().to_be_bytes());
            }
            InfoItem::Name(text) | InfoItem::Description(text) => {
                out.extend_from_slice(text::truncate(text).as_bytes());
            }
            InfoItem::BlockSize(sizes) => {
                [sizes.minimum, sizes.preferred, sizes.maximum]
                    .iter()
                    .for_each(|size| out.extend_from_slice(&size.to_be_bytes()));
            }
            InfoItem::Other(_) => {}
        }
    }
}

/// A reply to an option with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// Accepted, and nothing more follows.
    Ack,
    /// An export.
    Server {
        /// Its name.
        name: String,
        /// For a human; may be empty.
        description: String,
    },
    /// A fact about an export.
    Info(InfoItem),
    /// A metadata context.
    MetaContext {
        /// What BLOCK_STATUS will call it; says nothing in answer to LIST_META_CONTEXT.
        id: u32,
        /// Its name.
        name: String,
    },
    /// Refused, and nothing more follows.
    Refused(Refusal),
}

const REPLY_ACK: u32 = 1;
const REPLY_SERVER: u32 = 2;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;

impl OptionReply {
    /// Reads the data of a reply of type `kind`.
    ///
    /// # Errors
    /// [`ProtocolError`] for a type that is neither known nor an error, and for data that contradicts its type.
    pub fn parse(kind: u32, data: &[u8]) -> Result<Self, ProtocolError> {
        let length = data.len() as u64;
        let mut reader = Reader::new(data);
        match kind {
            REPLY_ACK if data.is_empty() => Ok(OptionReply::Ack),
            REPLY_ACK => Err(ProtocolError::Length { what: "an acknowledgement", length }),
            REPLY_SERVER => {
                let wrong = ProtocolError::Length { what: "an entry of the list of exports", length };
                let name = name(reader.counted().ok_or(wrong)?, "an export's name")?;
                Ok(OptionReply::Server { name, description: text::message(reader.rest()) })
            }
            REPLY_INFO => InfoItem::parse(data).map(OptionReply::Info),
            REPLY_META_CONTEXT => {
                let wrong = ProtocolError::Length { what: "a metadata context", length };
                let id = reader.u32().ok_or(wrong)?;
                Ok(OptionReply::MetaContext { id, name: name(reader.rest(), "a metadata context's name")? })
            }
            kind if kind & REPLY_ERROR != 0 => {
                Ok(OptionReply::Refused(Refusal::new(RefusalKind::from_code(kind), text::message(data))))
            }
            kind => Err(ProtocolError::Type { what: "a reply to an option", kind }),
        }
    }

    /// Appends this reply to `option`, header and data. Strings longer than the protocol allows are cut.
    pub fn encode(&self, option: OptionCode, out: &mut Vec<u8>) {
        let kind = match self {
            OptionReply::Ack => REPLY_ACK,
            OptionReply::Server { .. } => REPLY_SERVER,
            OptionReply::Info(_) => REPLY_INFO,
            OptionReply::MetaContext { .. } => REPLY_META_CONTEXT,
            OptionReply::Refused(refusal) => refusal.kind.code(),
        };
        let raw = RawOptionReply {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.code().into(),
            kind: kind.into(),
            length: 0.into(),
        };
        out.extend_from_slice(raw.as_bytes());
        let data = out.len();
        match self {
            OptionReply::Ack => {}
            OptionReply::Server { name, description } => {
                let name = text::truncate(name);
                out.extend_from_slice(&(name.len() as u32).to_be_bytes());
                out.extend_from_slice(name.as_bytes());
                out.extend_from_slice(text::truncate(description).as_bytes());
            }
            OptionReply::Info(item) => item.encode(out),
            OptionReply::MetaContext { id, name } => {
                out.extend_from_slice(&id.to_be_bytes());
                out.extend_from_slice(text::truncate(name).as_bytes());
            }
            OptionReply::Refused(refusal) => {
                out.extend_from_slice(text::truncate(&refusal.message).as_bytes());
            }
        }
        let length = (out.len() - data) as u32;
        out[data - 4..data].copy_from_slice(&length.to_be_bytes());
    }
}

fn name(bytes: &[u8], what: &'static str) -> Result<String, ProtocolError> {
    text::name(bytes).map_err(|why| ProtocolError::Content { what, why })
}
