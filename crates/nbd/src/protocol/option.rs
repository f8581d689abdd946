//! Options: what a client asks for before the transmission phase.

use zerocopy::{IntoBytes, transmute};

use super::wire::{OPTION_MAGIC, RawOption, Reader};
use super::{META_QUERIES_MAX, OPTION_DATA_MAX, OPTION_SKIP_MAX, ProtocolError, Refusal, RefusalKind, text};

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident: $type:ty { $($(#[$vdoc:meta])* $variant:ident = $value:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
            /// One that this side does not know.
            Other($type),
        }

        impl $name {
            /// The value on the wire.
            pub const fn code(self) -> $type {
                match self {
                    $($name::$variant => $value,)*
                    $name::Other(code) => code,
                }
            }

            /// What a value on the wire means.
            pub const fn from_code(code: $type) -> Self {
                match code {
                    $($value => $name::$variant,)*
                    code => $name::Other(code),
                }
            }
        }
    };
}
pub(super) use codes;

codes! {
    /// The options (NBD_OPT_*).
    OptionCode: u32 {
        /// Enter the transmission phase with this export; cannot be refused.
        ExportName = 1,
        /// End the session.
        Abort = 2,
        /// Which exports are there.
        List = 3,
        /// Begin TLS.
        StartTls = 5,
        /// What an export can do.
        Info = 6,
        /// The same, and enter the transmission phase with it.
        Go = 7,
        /// Use structured replies.
        StructuredReply = 8,
        /// Which metadata contexts are there.
        ListMetaContext = 9,
        /// Choose metadata contexts.
        SetMetaContext = 10,
        /// Use extended headers.
        ExtendedHeaders = 11,
    }
}

impl OptionCode {
    /// Whether an error can be the answer. Where not, the server must close instead.
    pub fn can_be_refused(self) -> bool {
        self != OptionCode::ExportName
    }
}

codes! {
    /// The kinds of information that INFO and GO can ask for (NBD_INFO_*).
    InfoType: u16 {
        /// Size and transmission flags; always sent.
        Export = 0,
        /// The canonical name.
        Name = 1,
        /// For a human.
        Description = 2,
        /// Size constraints.
        BlockSize = 3,
    }
}

/// What precedes the data of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub code: OptionCode,
    /// Of its data, in bytes; anything until [`OptionHeader::handling`] was asked.
    pub length: u32,
}

/// What a server does with the data of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handling {
    /// Read it and parse it.
    Read,
    /// Read it, a buffer at a time, forget it, and answer [`RefusalKind::TooBig`].
    Skip,
    /// Close the connection.
    Close,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const LENGTH: usize = size_of::<RawOption>();

    /// Reads the header of an option.
    ///
    /// # Errors
    /// [`ProtocolError::Magic`].
    pub fn parse(bytes: [u8; Self::LENGTH]) -> Result<Self, ProtocolError> {
        let raw: RawOption = transmute!(bytes);
        if raw.magic.get() != OPTION_MAGIC {
            return Err(ProtocolError::Magic { what: "an option", found: raw.magic.get() });
        }
        Ok(OptionHeader { code: OptionCode::from_code(raw.option.get()), length: raw.length.get() })
    }

    /// The bytes of this header.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        transmute!(RawOption {
            magic: OPTION_MAGIC.into(),
            option: self.code.code().into(),
            length: self.length.into(),
        })
    }

    /// What is to be done with the data, by its length.
    pub fn handling(self) -> Handling {
        match self.length {
            ..=OPTION_DATA_MAX => Handling::Read,
            ..=OPTION_SKIP_MAX if self.code.can_be_refused() => Handling::Skip,
            _ => Handling::Close,
        }
    }
}

/// What INFO and GO say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest {
    /// Name of the export.
    pub name: String,
    /// What the client wants to know.
    pub items: Vec<InfoType>,
}

impl InfoRequest {
    /// Whether the client asked for `item`.
    pub fn asks(&self, item: InfoType) -> bool {
        self.items.contains(&item)
    }

    fn parse(data: &[u8]) -> Result<Self, Refusal> {
        let mut reader = Reader::new(data);
        let name = reader.counted().ok_or_else(|| too_short("the export name"))?;
        let count = reader.u16().ok_or_else(|| too_short("the number of information requests"))?;
        let list = reader.rest();
        if list.len() != 2 * usize::from(count) {
            let got = list.len();
            return Err(Refusal::invalid(format!("{count} information requests do not take {got} bytes")));
        }
        let name = name_of(name, "export name")?;
        let items =
            list.chunks_exact(2).map(|b| InfoType::from_code(u16::from_be_bytes([b[0], b[1]]))).collect();
        Ok(InfoRequest { name, items })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_counted(&self.name, out);
        out.extend_from_slice(&(self.items.len() as u16).to_be_bytes());
        self.items.iter().for_each(|item| out.extend_from_slice(&item.code().to_be_bytes()));
    }
}

/// What LIST_META_CONTEXT and SET_META_CONTEXT say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContextRequest {
    /// Name of the export.
    pub export: String,
    /// Names of contexts, or patterns of them ([`selects`]).
    pub queries: Vec<String>,
}

impl MetaContextRequest {
    /// Syntax is judged before quantity: what is malformed is Invalid however much there is of it.
    fn parse(data: &[u8]) -> Result<Self, Refusal> {
        let mut reader = Reader::new(data);
        let export = reader.counted().ok_or_else(|| too_short("the export name"))?;
        let count = reader.u32().ok_or_else(|| too_short("the number of queries"))?;
        let export = name_of(export, "export name")?;
        let mut queries = Vec::new();
        for _ in 0..count {
            let query = name_of(reader.counted().ok_or_else(|| too_short("a query"))?, "query")?;
            if queries.len() < META_QUERIES_MAX {
                queries.push(query);
            }
        }
        if !reader.rest().is_empty() {
            return Err(Refusal::invalid("bytes follow the last query"));
        }
        if count as usize > META_QUERIES_MAX {
            let message = format!("{count} queries: at most {META_QUERIES_MAX} are taken");
            return Err(Refusal::new(RefusalKind::TooBig, message));
        }
        Ok(MetaContextRequest { export, queries })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_counted(&self.export, out);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        self.queries.iter().for_each(|query| put_counted(query, out));
    }
}

/// Whether `query` selects the context `name`. A namespace alone (`base:`) stands for all of it when contexts are
/// listed, and for none when they are set.
pub fn selects(query: &str, name: &str, listing: bool) -> bool {
    query == name || (listing && query.ends_with(':') && name.split_inclusive(':').next() == Some(query))
}

/// An option with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionRequest {
    /// Enter the transmission phase with the export of this name.
    ExportName(String),
    /// End the session.
    Abort,
    /// List the exports.
    List,
    /// Begin TLS.
    StartTls,
    /// Describe an export.
    Info(InfoRequest),
    /// Describe an export and enter the transmission phase with it.
    Go(InfoRequest),
    /// Use structured replies.
    StructuredReply,
    /// List metadata contexts; no query means all.
    ListMetaContext(MetaContextRequest),
    /// Choose metadata contexts; no query means none.
    SetMetaContext(MetaContextRequest),
    /// Use extended headers.
    ExtendedHeaders,
    /// One that this side does not know; its data is forgotten.
    Unknown(u32),
}

impl OptionRequest {
    /// Reads the data of an option.
    ///
    /// # Errors
    /// The answer that the protocol wants. For an option that cannot be answered so
    /// ([`OptionCode::can_be_refused`]) it means: close.
    pub fn parse(code: OptionCode, data: &[u8]) -> Result<Self, Refusal> {
        let empty = |request: OptionRequest| match data.len() {
            0 => Ok(request),
            length => {
                Err(Refusal::invalid(format!("this option takes no data, but came with {length} bytes")))
            }
        };
        match code {
            OptionCode::ExportName => name_of(data, "export name").map(OptionRequest::ExportName),
            // Data of ABORT is to be ignored, not refused.
            OptionCode::Abort => Ok(OptionRequest::Abort),
            OptionCode::List => empty(OptionRequest::List),
            OptionCode::StartTls => empty(OptionRequest::StartTls),
            OptionCode::Info => InfoRequest::parse(data).map(OptionRequest::Info),
            OptionCode::Go => InfoRequest::parse(data).map(OptionRequest::Go),
            OptionCode::StructuredReply => empty(OptionRequest::StructuredReply),
            OptionCode::ListMetaContext => {
                MetaContextRequest::parse(data).map(OptionRequest::ListMetaContext)
            }
            OptionCode::SetMetaContext => MetaContextRequest::parse(data).map(OptionRequest::SetMetaContext),
            OptionCode::ExtendedHeaders => empty(OptionRequest::ExtendedHeaders),
            OptionCode::Other(code) => Ok(OptionRequest::Unknown(code)),
        }
    }

    /// Which option this is.
    pub fn code(&self) -> OptionCode {
        match self {
            OptionRequest::ExportName(_) => OptionCode::ExportName,
            OptionRequest::Abort => OptionCode::Abort,
            OptionRequest::List => OptionCode::List,
            OptionRequest::StartTls => OptionCode::StartTls,
            OptionRequest::Info(_) => OptionCode::Info,
            OptionRequest::Go(_) => OptionCode::Go,
            OptionRequest::StructuredReply => OptionCode::StructuredReply,
            OptionRequest::ListMetaContext(_) => OptionCode::ListMetaContext,
            OptionRequest::SetMetaContext(_) => OptionCode::SetMetaContext,
            OptionRequest::ExtendedHeaders => OptionCode::ExtendedHeaders,
            OptionRequest::Unknown(code) => OptionCode::Other(*code),
        }
    }

    /// Appends header and data. Names are the caller's: it has kept them to [`super::STRING_BYTES_MAX`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        let begin = out.len();
        out.extend_from_slice(OptionHeader { code: self.code(), length: 0 }.encode().as_bytes());
        match self {
            OptionRequest::ExportName(name) => out.extend_from_slice(name.as_bytes()),
            OptionRequest::Info(request) | OptionRequest::Go(request) => request.encode(out),
            OptionRequest::ListMetaContext(request) | OptionRequest::SetMetaContext(request) => {
                request.encode(out);
            }
            OptionRequest::Abort
            | OptionRequest::List
            | OptionRequest::StartTls
            | OptionRequest::StructuredReply
            | OptionRequest::ExtendedHeaders
            | OptionRequest::Unknown(_) => {}
        }
        let data = begin + OptionHeader::LENGTH;
        let length = (out.len() - data) as u32;
        out[data - 4..data].copy_from_slice(&length.to_be_bytes());
    }
}

fn too_short(what: &str) -> Refusal {
    Refusal::invalid(format!("the option ends before {what} does"))
}

fn name_of(bytes: &[u8], what: &str) -> Result<String, Refusal> {
    text::name(bytes).map_err(|why| Refusal::invalid(format!("{what}: {why}")))
}

fn put_counted(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}
