//! The handshake: greeting, then options one after another until the transmission phase begins, TLS is to be started,
//! or the client has enough.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::export::{Context, Session};
use super::{Export, Server};
use crate::protocol::{
    ClientFlags, ExportNameReply, Greeting, Handling, HandshakeFlags, HeaderStyle, InfoRequest,
    MetaContextRequest, OptionCode, OptionHeader, OptionReply, OptionRequest, ProtocolError, Refusal,
    RefusalKind, selects,
};
use crate::tls::TlsPolicy;

/// What is read and forgotten at a time, of options that are too long, in bytes.
const SKIP_PIECE: u64 = 4096;

/// How option haggling ended.
pub(super) enum Outcome {
    /// The transmission phase begins.
    Transmission(Box<Session>),
    /// The client's next bytes are those of TLS.
    StartTls,
    /// The client ended it.
    Closed,
}

/// What one option leads to.
enum Step {
    /// To the next one.
    Next,
    Done(Outcome),
}

/// The state of option haggling on one connection.
pub(super) struct Haggling<'a> {
    server: &'a Server,
    client: ClientFlags,
    secure: bool,
    style: HeaderStyle,
    /// The export for which contexts were set last, and which.
    contexts: Option<(usize, Vec<Context>)>,
}

impl<'a> Haggling<'a> {
    /// Greets the client and takes its flags.
    ///
    /// # Errors
    /// When the stream fails or the client wants what was not offered.
    pub(super) async fn begin<S>(server: &'a Server, stream: &mut S) -> io::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        stream.write_all(&Greeting { flags }.encode()).await?;
        stream.flush().await?;
        let mut bytes = [0; ClientFlags::LENGTH];
        stream.read_exact(&mut bytes).await?;
        let client = ClientFlags::parse(bytes, flags).map_err(broken)?;
        Ok(Haggling { server, client, secure: false, style: HeaderStyle::Simple, contexts: None })
    }

    /// TLS has begun: nothing that was said before may count.
    pub(super) fn secured(&mut self) {
        self.secure = true;
        self.style = HeaderStyle::Simple;
        self.contexts = None;
    }

    /// Answers options.
    ///
    /// # Errors
    /// When the stream fails, or the client breaks the protocol so that no answer is possible.
    pub(super) async fn options<S>(&mut self, stream: &mut S) -> io::Result<Outcome>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut replies = Vec::new();
        loop {
            let mut header = [0; OptionHeader::LENGTH];
            match stream.read_exact(&mut header).await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Outcome::Closed),
                read => read?,
            };
            let header = OptionHeader::parse(header).map_err(broken)?;
            let parsed = read_data(stream, header).await?;
            replies.clear();
            let step = self.answer(header.code, parsed, &mut replies)?;
            stream.write_all(&replies).await?;
            stream.flush().await?;
            if let Step::Done(outcome) = step {
                return Ok(outcome);
            }
        }
    }

    /// Answers one option. An error means that the connection must be closed.
    fn answer(
        &mut self,
        code: OptionCode,
        parsed: Result<OptionRequest, Refusal>,
        replies: &mut Vec<u8>,
    ) -> io::Result<Step> {
        if code == OptionCode::SetMetaContext {
            // Whatever was chosen before is gone, even if this fails.
            self.contexts = None;
        }
        let answered = match self.permitted(code) {
            Ok(()) => parsed.and_then(|request| self.accept(request, replies)),
            Err(refusal) => Err(refusal),
        };
        match answered {
            Ok(step) => Ok(step),
            Err(refusal) if code.can_be_refused() => {
                tracing::debug!(?code, %refusal, "refused an option");
                OptionReply::Refused(refusal).encode(code, replies);
                Ok(Step::Next)
            }
            Err(refusal) => Err(io::Error::other(format!("EXPORT_NAME cannot be answered: {refusal}"))),
        }
    }

    /// Whether `code` may be asked for now at all.
    fn permitted(&self, code: OptionCode) -> Result<(), Refusal> {
        // Who has not agreed to fixed newstyle must not hear of TLS.
        if !self.client.contains(ClientFlags::FIXED_NEWSTYLE)
            && !matches!(code, OptionCode::ExportName | OptionCode::Abort)
        {
            let message = "options need the fixed newstyle handshake, which the client did not choose";
            return Err(Refusal::new(RefusalKind::Invalid, message));
        }
        let without_tls = matches!(code, OptionCode::StartTls | OptionCode::Abort);
        if matches!(self.server.options.tls, TlsPolicy::Require(_)) && !self.secure && !without_tls {
            return Err(Refusal::new(RefusalKind::TlsRequired, "this server wants TLS first"));
        }
        Ok(())
    }

    fn accept(&mut self, request: OptionRequest, replies: &mut Vec<u8>) -> Result<Step, Refusal> {
        let code = request.code();
        let mut ack = |step: Step| {
            OptionReply::Ack.encode(code, replies);
            Ok(step)
        };
        match request {
            OptionRequest::ExportName(name) => self.export_name(&name, replies),
            OptionRequest::Abort => ack(Step::Done(Outcome::Closed)),
            OptionRequest::List => {
                self.list(replies);
                Ok(Step::Next)
            }
            OptionRequest::StartTls => {
                self.may_start_tls()?;
                ack(Step::Done(Outcome::StartTls))
            }
            OptionRequest::Info(request) => {
                self.inform(code, &request, replies)?;
                Ok(Step::Next)
            }
            OptionRequest::Go(request) => {
                let session = self.inform(code, &request, replies)?;
                Ok(Step::Done(Outcome::Transmission(Box::new(session))))
            }
            OptionRequest::StructuredReply if self.style == HeaderStyle::Extended => {
                let message = "extended headers are in use, which replace structured replies";
                Err(Refusal::new(RefusalKind::ExtendedHeadersRequired, message))
            }
            OptionRequest::StructuredReply => {
                self.style = HeaderStyle::Structured;
                ack(Step::Next)
            }
            OptionRequest::ExtendedHeaders => {
                self.style = HeaderStyle::Extended;
                ack(Step::Next)
            }
            OptionRequest::ListMetaContext(request) => self.list_contexts(&request, replies),
            OptionRequest::SetMetaContext(request) => self.set_contexts(&request, replies),
            OptionRequest::Unknown(code) => {
                Err(Refusal::new(RefusalKind::Unsupported, format!("option {code} is not known")))
            }
        }
    }

    /// The export called `name`, or the first for the empty name.
    fn export(&self, name: &str) -> Result<(usize, &'a Export), Refusal> {
        let exports = &self.server.exports;
        let named = exports.iter().position(|export| export.name == name);
        let index = named.or_else(|| name.is_empty().then_some(0));
        match index {
            Some(index) => Ok((index, &exports[index])),
            None => Err(Refusal::new(RefusalKind::UnknownExport, format!("no export is called {name:?}"))),
        }
    }

    fn session(&self, index: usize) -> Session {
        let export = &self.server.exports[index];
        let contexts = match &self.contexts {
            Some((chosen, contexts)) if *chosen == index => contexts.clone(),
            _ => Vec::new(),
        };
        let terms = export.terms(self.style, !contexts.is_empty());
        Session { device: export.device.clone(), terms, contexts }
    }

    fn export_name(&self, name: &str, replies: &mut Vec<u8>) -> Result<Step, Refusal> {
        if self.style == HeaderStyle::Extended {
            return Err(Refusal::new(RefusalKind::Invalid, "with extended headers only GO may be used"));
        }
        let (index, _) = self.export(name)?;
        let session = self.session(index);
        let reply = ExportNameReply { size: session.terms.size, flags: session.terms.flags };
        reply.encode(self.client, replies);
        Ok(Step::Done(Outcome::Transmission(Box::new(session))))
    }

    fn list(&self, replies: &mut Vec<u8>) {
        for export in &self.server.exports {
            let (name, description) = (export.name.clone(), export.description.clone());
            OptionReply::Server { name, description }.encode(OptionCode::List, replies);
        }
        OptionReply::Ack.encode(OptionCode::List, replies);
    }

    fn may_start_tls(&self) -> Result<(), Refusal> {
        if self.secure {
            return Err(Refusal::new(RefusalKind::Invalid, "TLS has begun already"));
        }
        match self.server.options.tls {
            TlsPolicy::Refuse => Err(Refusal::new(RefusalKind::Policy, "this server does not offer TLS")),
            TlsPolicy::Allow(_) | TlsPolicy::Require(_) => Ok(()),
        }
    }

    fn inform(
        &self,
        code: OptionCode,
        request: &InfoRequest,
        replies: &mut Vec<u8>,
    ) -> Result<Session, Refusal> {
        let (index, export) = self.export(&request.name)?;
        let session = self.session(index);
        for item in export.information(request, &session.terms) {
            OptionReply::Info(item).encode(code, replies);
        }
        OptionReply::Ack.encode(code, replies);
        Ok(session)
    }

    fn list_contexts(&self, request: &MetaContextRequest, replies: &mut Vec<u8>) -> Result<Step, Refusal> {
        self.needs_chunks()?;
        self.export(&request.export)?;
        for context in Context::ALL {
            let name = context.name();
            let matches = request.queries.iter().any(|query| selects(query, name, true));
            if request.queries.is_empty() || matches {
                let reply = OptionReply::MetaContext { id: 0, name: name.to_owned() };
                reply.encode(OptionCode::ListMetaContext, replies);
            }
        }
        OptionReply::Ack.encode(OptionCode::ListMetaContext, replies);
        Ok(Step::Next)
    }

    fn set_contexts(&mut self, request: &MetaContextRequest, replies: &mut Vec<u8>) -> Result<Step, Refusal> {
        self.needs_chunks()?;
        let (index, _) = self.export(&request.export)?;
        let chosen =
            |context: &Context| request.queries.iter().any(|query| selects(query, context.name(), false));
        let contexts: Vec<Context> = Context::ALL.into_iter().filter(chosen).collect();
        for context in &contexts {
            let reply = OptionReply::MetaContext { id: context.id(), name: context.name().to_owned() };
            reply.encode(OptionCode::SetMetaContext, replies);
        }
        OptionReply::Ack.encode(OptionCode::SetMetaContext, replies);
        self.contexts = Some((index, contexts));
        Ok(Step::Next)
    }

    fn needs_chunks(&self) -> Result<(), Refusal> {
        if self.style.chunks() {
            return Ok(());
        }
        let message = "metadata contexts need structured replies or extended headers first";
        Err(Refusal::new(RefusalKind::Invalid, message))
    }
}

/// Reads the data of an option, or past it where it is too long.
async fn read_data<S>(stream: &mut S, header: OptionHeader) -> io::Result<Result<OptionRequest, Refusal>>
where
    S: AsyncRead + Unpin,
{
    match header.handling() {
        Handling::Read => {
            let mut data = vec![0; header.length as usize];
            stream.read_exact(&mut data).await?;
            Ok(OptionRequest::parse(header.code, &data))
        }
        Handling::Skip => {
            let mut piece = [0; SKIP_PIECE as usize];
            let mut rest = u64::from(header.length);
            while rest > 0 {
                let length = rest.min(SKIP_PIECE);
                stream.read_exact(&mut piece[..length as usize]).await?;
                rest -= length;
            }
            let message = format!("an option of {} bytes is more than is taken", header.length);
            Ok(Err(Refusal::new(RefusalKind::TooBig, message)))
        }
        Handling::Close => {
            let length = u64::from(header.length);
            Err(broken(ProtocolError::Length { what: "an option", length }))
        }
    }
}

/// A client that broke the protocol so that the connection must be closed.
pub(super) fn broken(error: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
