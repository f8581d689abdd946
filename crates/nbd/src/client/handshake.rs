//! The handshake: from a fresh connection to the transmission phase of an export, with the most that the server offers
//! (TLS, then extended headers, else structured replies, then metadata contexts, then GO), down to servers that know
//! nothing but EXPORT_NAME.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::ClientOptions;
use super::error::ConnectError;
use super::export::ExportInfo;
use super::transport::{Socket, Transport};
use crate::protocol::{
    BASE_ALLOCATION, ClientFlags, ExportNameReply, Greeting, HandshakeFlags, HeaderStyle, InfoItem,
    InfoRequest, InfoType, LOAM_LOCALITY, MetaContextRequest, OptionCode, OptionReply, OptionReplyHeader,
    OptionRequest, ProtocolError, Refusal, RefusalKind,
};
use crate::tls::ClientTls;
use crate::uri::{Address, Uri};

/// Replies to one option, final one included, that are read before the server is taken for one that never ends.
const REPLIES_MAX: usize = 16 << 10;

/// What BLOCK_STATUS calls the contexts, on one connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ContextIds {
    pub(super) allocation: Option<u32>,
    pub(super) locality: Option<u32>,
}

/// A connection that has entered the transmission phase.
pub(super) struct Negotiated {
    pub(super) transport: Transport,
    pub(super) style: HeaderStyle,
    pub(super) export: ExportInfo,
    pub(super) contexts: ContextIds,
}

/// A connection that is asking.
pub(super) struct Handshake<'a> {
    pub(super) uri: &'a Uri,
    transport: Transport,
    offered: HandshakeFlags,
    pub(super) style: HeaderStyle,
    pub(super) tls: bool,
}

/// How the way into the transmission phase ended.
enum Entered {
    Yes(ExportInfo),
    /// The server does not know GO.
    Unsupported,
}

impl<'a> Handshake<'a> {
    /// Connects and does what comes first for every purpose: greeting, TLS, headers.
    pub(super) async fn begin(uri: &'a Uri, options: &ClientOptions) -> Result<Self, ConnectError> {
        let tls = client_tls(uri, options)?;
        let failed = |source| ConnectError::Io { uri: uri.to_string(), source };
        let socket = Socket::connect(&uri.address).await.map_err(failed)?;
        let mut this = Handshake {
            uri,
            transport: Transport::Plain(socket),
            offered: HandshakeFlags::empty(),
            style: HeaderStyle::Simple,
            tls: false,
        };
        this.greet().await?;
        if let Some(tls) = tls {
            this = this.start_tls(&tls).await?;
        }
        if this.is_fixed() {
            this.choose_headers().await?;
        }
        Ok(this)
    }

    /// Enters the transmission phase.
    pub(super) async fn enter(mut self) -> Result<Negotiated, ConnectError> {
        let mut contexts = ContextIds::default();
        if self.style != HeaderStyle::Simple {
            contexts = self.choose_contexts().await?;
        }
        let mut entered = Entered::Unsupported;
        if self.is_fixed() {
            entered = self.go().await?;
        }
        let mut export = match entered {
            Entered::Yes(export) => export,
            Entered::Unsupported => self.export_name().await?,
        };
        let chosen = [(contexts.allocation, BASE_ALLOCATION), (contexts.locality, LOAM_LOCALITY)];
        export.contexts = chosen.iter().filter_map(|(id, name)| id.map(|_| (*name).to_owned())).collect();
        Ok(Negotiated { transport: self.transport, style: self.style, export, contexts })
    }

    /// Whether the server knows more than EXPORT_NAME.
    pub(super) fn is_fixed(&self) -> bool {
        self.offered.contains(HandshakeFlags::FIXED_NEWSTYLE)
    }

    async fn greet(&mut self) -> Result<(), ConnectError> {
        let mut bytes = [0; Greeting::LENGTH];
        self.read(&mut bytes[..16]).await?;
        // An oldstyle server goes on differently, but these sixteen bytes tell.
        Greeting::parse(bytes).map_err(|source| self.broken(source))?;
        self.read(&mut bytes[16..]).await?;
        self.offered = Greeting::parse(bytes).map_err(|source| self.broken(source))?.flags;
        self.write(&self.client_flags().encode()).await
    }

    fn client_flags(&self) -> ClientFlags {
        let mut flags = ClientFlags::empty();
        flags.set(ClientFlags::FIXED_NEWSTYLE, self.is_fixed());
        flags.set(ClientFlags::NO_ZEROES, self.offered.contains(HandshakeFlags::NO_ZEROES));
        flags
    }

    async fn start_tls(mut self, tls: &ClientTls) -> Result<Self, ConnectError> {
        let uri = self.uri.to_string();
        let refused = |reason: String| ConnectError::TlsRefused { uri: uri.clone(), reason };
        let answer = if self.is_fixed() {
            self.ask(&OptionRequest::StartTls, |_| Ok(())).await?
        } else {
            Err(Refusal::new(RefusalKind::Unsupported, "the server is too old"))
        };
        match answer {
            Ok(()) => {}
            Err(_) if !self.uri.tls => return Ok(self),
            Err(refusal) => return Err(refused(refusal.to_string())),
        }
        let host = match (&self.uri.tls_parameters.hostname, &self.uri.address) {
            (Some(name), _) => name,
            (None, Address::Tcp { host, .. }) => host,
            (None, Address::Unix(_)) => "localhost",
        };
        let Transport::Plain(socket) = self.transport else { return Ok(self) };
        let failed = |source| ConnectError::TlsFailed { uri, source };
        let stream = tls.connect(host, socket).await.map_err(failed)?;
        Ok(Handshake { transport: Transport::Tls(Box::new(stream)), tls: true, ..self })
    }

    async fn choose_headers(&mut self) -> Result<(), ConnectError> {
        let candidates = [
            (OptionRequest::ExtendedHeaders, HeaderStyle::Extended),
            (OptionRequest::StructuredReply, HeaderStyle::Structured),
        ];
        for (option, style) in candidates {
            match self.ask(&option, |_| Ok(())).await? {
                Ok(()) => {
                    self.style = style;
                    return Ok(());
                }
                Err(refusal) => self.check_fatal(refusal, "negotiate")?,
            }
        }
        Ok(())
    }

    /// Refusals after which nothing else will succeed.
    pub(super) fn check_fatal(&self, refusal: Refusal, what: &'static str) -> Result<(), ConnectError> {
        match refusal.kind {
            RefusalKind::TlsRequired | RefusalKind::Shutdown => Err(self.refused(refusal, what)),
            _ => Ok(()),
        }
    }

    async fn choose_contexts(&mut self) -> Result<ContextIds, ConnectError> {
        let queries = vec![BASE_ALLOCATION.to_owned(), LOAM_LOCALITY.to_owned()];
        let option =
            OptionRequest::SetMetaContext(MetaContextRequest { export: self.uri.export.clone(), queries });
        let mut contexts = ContextIds::default();
        let answer = self.ask(&option, |reply| {
            let OptionReply::MetaContext { id, name } = reply else { return Ok(()) };
            let twice = ProtocolError::Content { what: "a metadata context", why: "it was chosen already" };
            let place = match name.as_str() {
                BASE_ALLOCATION => &mut contexts.allocation,
                LOAM_LOCALITY => &mut contexts.locality,
                _ => {
                    let why = "it was not asked for";
                    return Err(ProtocolError::Content { what: "a metadata context", why });
                }
            };
            if place.replace(id).is_some() { Err(twice) } else { Ok(()) }
        });
        let answer = answer.await?;
        if contexts.allocation.is_some() && contexts.allocation == contexts.locality {
            let why = "two of them have the same id";
            return Err(self.broken(ProtocolError::Content { what: "metadata contexts", why }));
        }
        match answer {
            Ok(()) => Ok(contexts),
            Err(refusal) => {
                // What is wrong with the export GO says better.
                self.check_fatal(refusal, "choose metadata contexts").map(|()| ContextIds::default())
            }
        }
    }

    async fn go(&mut self) -> Result<Entered, ConnectError> {
        let option = OptionRequest::Go(info_request(&self.uri.export));
        match self.ask_info(&self.uri.export.clone(), &option).await? {
            Ok(Some(export)) => Ok(Entered::Yes(export)),
            Ok(None) => {
                let why = "it says nothing of size and flags";
                Err(self.broken(ProtocolError::Content { what: "the answer to GO", why }))
            }
            Err(refusal)
                if refusal.kind == RefusalKind::Unsupported && self.style != HeaderStyle::Extended =>
            {
                Ok(Entered::Unsupported)
            }
            Err(refusal) => Err(self.refused(refusal, "serve the export")),
        }
    }

    /// INFO or GO: what the server says of the export `name`; `None` without the item that is mandatory.
    pub(super) async fn ask_info(
        &mut self,
        name: &str,
        option: &OptionRequest,
    ) -> Result<Result<Option<ExportInfo>, Refusal>, ConnectError> {
        let mut export = ExportInfo::unknown(name, self.style, self.tls);
        let mut described = false;
        let answer = self.ask(option, |reply| {
            let OptionReply::Info(item) = reply else { return Ok(()) };
            match item {
                InfoItem::Export(facts) => {
                    described = true;
                    export.size = facts.size;
                    export.flags = facts.flags.into();
                }
                InfoItem::Name(name) => export.name = name,
                InfoItem::Description(text) => export.description = text,
                InfoItem::BlockSize(sizes) => {
                    export.minimum_block = sizes.minimum;
                    export.preferred_block = sizes.preferred;
                    export.maximum_block = sizes.maximum;
                    export.block_sizes_advertised = true;
                }
                InfoItem::Other(_) => {}
            }
            Ok(())
        });
        Ok(answer.await?.map(|()| described.then_some(export)))
    }

    /// The way of old servers, which cannot refuse but by closing the connection.
    async fn export_name(&mut self) -> Result<ExportInfo, ConnectError> {
        let mut bytes = Vec::new();
        OptionRequest::ExportName(self.uri.export.clone()).encode(&mut bytes);
        self.write(&bytes).await?;
        let mut reply = [0; ExportNameReply::LENGTH];
        self.read(&mut reply).await?;
        if !self.client_flags().contains(ClientFlags::NO_ZEROES) {
            self.read(&mut [0; ExportNameReply::ZEROES]).await?;
        }
        let reply = ExportNameReply::parse(reply);
        let mut export = ExportInfo::unknown(&self.uri.export, self.style, self.tls);
        export.size = reply.size;
        export.flags = reply.flags.into();
        Ok(export)
    }

    /// Sends an option and gives each reply but the final one to `each`.
    pub(super) async fn ask(
        &mut self,
        option: &OptionRequest,
        mut each: impl FnMut(OptionReply) -> Result<(), ProtocolError>,
    ) -> Result<Result<(), Refusal>, ConnectError> {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        self.write(&bytes).await?;
        for _ in 0..REPLIES_MAX {
            match self.reply(option.code()).await? {
                OptionReply::Ack => return Ok(Ok(())),
                OptionReply::Refused(refusal) => return Ok(Err(refusal)),
                reply => each(reply).map_err(|source| self.broken(source))?,
            }
        }
        let what = "the answer to an option";
        Err(self.broken(ProtocolError::Content { what, why: "it does not end" }))
    }

    async fn reply(&mut self, option: OptionCode) -> Result<OptionReply, ConnectError> {
        let mut header = [0; OptionReplyHeader::LENGTH];
        self.read(&mut header).await?;
        let header = OptionReplyHeader::parse(header, option).map_err(|source| self.broken(source))?;
        let mut data = vec![0; header.length as usize];
        self.read(&mut data).await?;
        OptionReply::parse(header.kind, &data).map_err(|source| self.broken(source))
    }

    /// Ends the session as the protocol wishes; the answer is not waited for.
    pub(super) async fn abort(mut self) {
        let mut bytes = Vec::new();
        OptionRequest::Abort.encode(&mut bytes);
        self.write(&bytes).await.ok();
        self.transport.shutdown().await.ok();
    }

    async fn read(&mut self, bytes: &mut [u8]) -> Result<(), ConnectError> {
        let result = self.transport.read_exact(bytes).await;
        result.map(drop).map_err(|source| ConnectError::Io { uri: self.uri.to_string(), source })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), ConnectError> {
        let result = async {
            self.transport.write_all(bytes).await?;
            self.transport.flush().await
        };
        let result = result.await;
        result.map_err(|source| ConnectError::Io { uri: self.uri.to_string(), source })
    }

    fn broken(&self, source: ProtocolError) -> ConnectError {
        ConnectError::Protocol { uri: self.uri.to_string(), source }
    }

    pub(super) fn refused(&self, refusal: Refusal, what: &'static str) -> ConnectError {
        let uri = self.uri.to_string();
        match refusal.kind {
            RefusalKind::TlsRequired => ConnectError::TlsRequired { uri },
            RefusalKind::UnknownExport => ConnectError::NoSuchExport { uri, refusal },
            _ => ConnectError::Refused { uri, what, refusal },
        }
    }
}

pub(super) fn info_request(name: &str) -> InfoRequest {
    let items = vec![InfoType::Name, InfoType::Description, InfoType::BlockSize];
    InfoRequest { name: name.to_owned(), items }
}

/// What TLS is spoken with, if at all. `nbd://` uses it where something was given for it, `nbds://` needs it.
fn client_tls(uri: &Uri, options: &ClientOptions) -> Result<Option<ClientTls>, ConnectError> {
    let verify_name = uri.tls_parameters.verify_peer.unwrap_or(true);
    match (&options.tls, &uri.tls_parameters.certificates) {
        (_, Some(directory)) => ClientTls::from_directory(directory, verify_name)
            .map(Some)
            .map_err(|source| ConnectError::Certificates { uri: uri.to_string(), source }),
        (Some(tls), None) => Ok(Some(tls.clone())),
        (None, None) if uri.tls => Err(ConnectError::NoCertificates { uri: uri.to_string() }),
        (None, None) => Ok(None),
    }
}
