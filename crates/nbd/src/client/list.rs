//! Which exports a server has.

use super::ClientOptions;
use super::error::ConnectError;
use super::export::ExportInfo;
use super::handshake::{Handshake, info_request};
use crate::protocol::{HeaderStyle, MetaContextRequest, OptionReply, OptionRequest};
use crate::uri::Uri;

/// Exports that are asked about one by one; of those beyond, only names and descriptions are told.
const ASKED_MAX: usize = 1024;

/// The exports of the server at `uri`, whose own export name does not matter, in the server's order. Of a server that
/// does not know INFO, and of exports that it says nothing about, only names and descriptions are known; their size is 0.
///
/// # Errors
/// When the server cannot be reached, breaks the protocol, or does not list its exports.
pub async fn list(uri: &Uri, options: &ClientOptions) -> Result<Vec<ExportInfo>, ConnectError> {
    let listing = tokio::time::timeout(options.request_timeout, list_exports(uri, options));
    listing.await.map_err(|_| ConnectError::TimedOut { uri: uri.to_string() })?
}

async fn list_exports(uri: &Uri, options: &ClientOptions) -> Result<Vec<ExportInfo>, ConnectError> {
    let mut handshake = Handshake::begin(uri, options).await?;
    let (style, tls) = (handshake.style, handshake.tls);
    let mut exports = Vec::new();
    let answer = handshake.ask(&OptionRequest::List, |reply| {
        if let OptionReply::Server { name, description } = reply {
            exports.push(ExportInfo { description, ..ExportInfo::unknown(&name, style, tls) });
        }
        Ok(())
    });
    answer.await?.map_err(|refusal| handshake.refused(refusal, "list its exports"))?;
    for export in exports.iter_mut().take(ASKED_MAX) {
        describe(&mut handshake, export).await?;
    }
    handshake.abort().await;
    Ok(exports)
}

/// Adds what INFO and LIST_META_CONTEXT say.
async fn describe(handshake: &mut Handshake<'_>, export: &mut ExportInfo) -> Result<(), ConnectError> {
    let name = export.name.clone();
    let option = OptionRequest::Info(info_request(&name));
    if let Ok(Some(mut info)) = handshake.ask_info(&name, &option).await? {
        if info.description.is_empty() {
            info.description = std::mem::take(&mut export.description);
        }
        *export = info;
    }
    if handshake.style == HeaderStyle::Simple {
        return Ok(());
    }
    let option = OptionRequest::ListMetaContext(MetaContextRequest { export: name, queries: Vec::new() });
    let mut contexts = Vec::new();
    let answer = handshake.ask(&option, |reply| {
        if let OptionReply::MetaContext { name, .. } = reply {
            contexts.push(name);
        }
        Ok(())
    });
    if answer.await?.is_ok() {
        export.contexts = contexts;
    }
    Ok(())
}
