//! The connections of a device: which one a request goes to, how a broken one is made again, and what may have been lost
//! with it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use loam_block::{Error, ErrorKind, Result};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::ClientOptions;
use super::error::ConnectError;
use super::exchange::{Body, Exchange, Order};
use super::export::ExportInfo;
use super::failure::Failure;
use super::handshake::{Handshake, Negotiated};
use super::link::{Link, lock};
use crate::protocol::{Command, CommandFlags, StatusChunk};
use crate::uri::Uri;

/// How often one request is sent, when the connections under it break.
const SENDINGS_MAX: u32 = 5;
/// The pause before the second attempt to connect; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often a busy connection is looked at, unless its time-outs are very short.
const TICK_MAX: Duration = Duration::from_millis(250);
const TICK_MIN: Duration = Duration::from_millis(5);

#[derive(Default)]
struct Member {
    link: Option<Arc<Link>>,
    /// A task is at it.
    connecting: bool,
    /// Why the last attempts were given up.
    failure: Option<Error>,
}

/// The connections of one device.
pub(super) struct Pool {
    pub(super) uri: Uri,
    pub(super) export: ExportInfo,
    options: ClientOptions,
    /// Where tasks run: requests may be polled elsewhere.
    handle: Handle,
    members: Vec<Mutex<Member>>,
    /// Something became of a connection.
    news: Notify,
    /// The export is another than it was.
    changed: OnceLock<Error>,
    epochs: AtomicU64,
    /// Bytes that were acknowledged on connections that broke before a flush.
    lost: AtomicU64,
    /// A flush would have something to do, as far as is known.
    closed: AtomicBool,
}

/// What a request came to.
pub(super) enum Trouble {
    /// The server's refusal, or a broken connection.
    Failed(Failure),
    /// There is no connection.
    Down(Error),
}

impl Pool {
    /// Connects: once, and if that shows that more connections are of use, the others at the same time. Those that fail
    /// are done without: a server may have a limit.
    pub(super) async fn open(uri: Uri, options: ClientOptions) -> Result<Arc<Self>, ConnectError> {
        let first = negotiate(&uri, &options).await?;
        let wanted = if first.export.flags.multi_connection { options.connections } else { 1 };
        let more = (1..wanted.min(super::CONNECTIONS_MAX)).map(|_| negotiate(&uri, &options));
        let more = futures_util::future::join_all(more).await;
        let export = first.export.clone();
        let alike = more.into_iter().flatten().filter(|other| is_same(&export, &other.export));
        let all: Vec<Negotiated> = std::iter::once(first).chain(alike).collect();
        let handle = Handle::current();
        let link = |negotiated| {
            let link = start(negotiated, 0, &options, &handle);
            Mutex::new(Member { link: Some(link), ..Member::default() })
        };
        let members = all.into_iter().map(link).collect();
        Ok(Arc::new(Pool {
            uri,
            export,
            options,
            handle,
            members,
            news: Notify::new(),
            changed: OnceLock::new(),
            epochs: AtomicU64::new(1),
            lost: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        }))
    }

    pub(super) fn connections(&self) -> usize {
        self.members.len()
    }

    /// Carries out a request on the connection whose turn it is, again if that breaks.
    pub(super) async fn run(
        self: &Arc<Self>,
        order: Order,
        mut body: Body<'_>,
    ) -> Result<(Arc<Link>, Vec<StatusChunk>), Trouble> {
        let mut sendings = 1;
        loop {
            let link = self.link().await.map_err(Trouble::Down)?;
            match Exchange::new(&link, order, body.again()).await {
                Ok(status) => return Ok((link, status)),
                Err(failure) => self.judge(&link, failure, &mut sendings)?,
            }
        }
    }

    /// Whether a failed request is to be sent again.
    fn judge(
        self: &Arc<Self>,
        link: &Arc<Link>,
        failure: Failure,
        sendings: &mut u32,
    ) -> Result<(), Trouble> {
        let Failure::Broken(cause) = &failure else { return Err(Trouble::Failed(failure)) };
        self.report(link);
        *sendings += 1;
        if cause.is_transient() && *sendings <= SENDINGS_MAX { Ok(()) } else { Err(Trouble::Failed(failure)) }
    }

    /// A write of `bytes` was acknowledged on `link`, and is not known to be on stable storage.
    pub(super) fn wrote(&self, link: &Link, bytes: u64) {
        link.unflushed.fetch_add(bytes, Ordering::SeqCst);
        if link.is_broken() {
            self.give_up(link);
        }
    }

    fn give_up(&self, link: &Link) {
        self.lost.fetch_add(link.unflushed.swap(0, Ordering::SeqCst), Ordering::SeqCst);
    }

    /// Fails once if acknowledged writes may be gone.
    fn check_lost(&self) -> Result<()> {
        match self.lost.swap(0, Ordering::SeqCst) {
            0 => Ok(()),
            lost => {
                let context = format!(
                    "flush of {}: the connection broke since the last one, and {lost} bytes that were written before \
                     may be lost with the server's cache: write them again",
                    self.uri
                );
                Err(Error::new(ErrorKind::WritesLost, context))
            }
        }
    }

    /// Makes all acknowledged writes durable, on all connections.
    ///
    /// One flush is enough where the server promises that its connections see the same. It goes to the oldest of them:
    /// when that answers, it has been there since before every write that is to be flushed, and so has the server. A
    /// younger one might speak to a server that was started after others, unnoticed, had died.
    pub(super) async fn flush(self: &Arc<Self>) -> Result<()> {
        self.check_lost()?;
        let order = Order { command: Command::Flush, flags: CommandFlags::empty(), offset: 0, length: 0 };
        let mut sendings = 1;
        loop {
            let mut links = self.links();
            if links.is_empty() {
                links = vec![self.link().await?];
            }
            let covered: Vec<u64> = links.iter().map(|link| link.unflushed.load(Ordering::SeqCst)).collect();
            let Some(oldest) = links.iter().min_by_key(|link| link.epoch) else { continue };
            let mut result = Ok(());
            if self.export.flags.flush {
                result = Exchange::new(oldest, order, Body::None).await.map(drop);
            }
            let Err(failure) = result else {
                for (link, covered) in links.iter().zip(covered) {
                    let less = |bytes: u64| Some(bytes.saturating_sub(covered));
                    link.unflushed.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).ok();
                }
                return self.check_lost();
            };
            let judged = self.judge(oldest, failure, &mut sendings);
            self.check_lost()?;
            judged.map_err(|trouble| trouble.error(format!("flush of {}", self.uri)))?;
        }
    }

    fn links(&self) -> Vec<Arc<Link>> {
        self.members.iter().filter_map(|member| lock(member).link.clone()).collect()
    }

    fn choose(&self) -> Option<Arc<Link>> {
        if let [member] = &self.members[..] {
            return lock(member).link.clone();
        }
        let mut best: Option<(u64, Arc<Link>)> = None;
        for member in &self.members {
            let member = lock(member);
            let Some(link) = &member.link else { continue };
            if link.in_flight() < self.options.fill {
                return Some(link.clone());
            }
            let load = link.load();
            if best.as_ref().is_none_or(|(least, _)| load < *least) {
                best = Some((load, link.clone()));
            }
            if load == 0 {
                break;
            }
        }
        best.map(|(_, link)| link)
    }

    /// A connection, waited for if all are broken.
    async fn link(self: &Arc<Self>) -> Result<Arc<Link>> {
        let mut waited = false;
        loop {
            if let Some(link) = self.choose() {
                return Ok(link);
            }
            let news = self.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if let Some(error) = self.changed.get() {
                return Err(error.clone());
            }
            let mut failure = None;
            let mut hope = false;
            for (index, member) in self.members.iter().enumerate() {
                let mut member = lock(member);
                if !waited && member.link.is_none() {
                    self.connect_again(&mut member, index);
                }
                hope |= member.link.is_some() || member.connecting;
                failure = failure.or(member.failure.clone());
            }
            if let Some(failure) = failure.filter(|_| !hope) {
                return Err(failure);
            }
            news.await;
            waited = true;
        }
    }

    /// `link` was found broken: what it held is counted, and another is made in its place.
    fn report(self: &Arc<Self>, link: &Arc<Link>) {
        self.give_up(link);
        for (index, member) in self.members.iter().enumerate() {
            let mut member = lock(member);
            if member.link.as_ref().is_some_and(|other| Arc::ptr_eq(other, link)) {
                member.link = None;
                self.connect_again(&mut member, index);
            }
        }
    }

    fn connect_again(self: &Arc<Self>, member: &mut Member, index: usize) {
        if !std::mem::replace(&mut member.connecting, true) {
            member.failure = None;
            self.handle.spawn(reconnect(Arc::downgrade(self), index));
        }
    }

    async fn attempt(&self) -> Result<Arc<Link>> {
        let negotiated = negotiate(&self.uri, &self.options).await?;
        if is_same(&self.export, &negotiated.export) {
            let epoch = self.epochs.fetch_add(1, Ordering::Relaxed);
            return Ok(start(negotiated, epoch, &self.options, &self.handle));
        }
        let (old, new) = (&self.export, &negotiated.export);
        let context = format!(
            "{}: the export is another than before: {} bytes, now {}; or what it can do is: open it again",
            self.uri, old.size, new.size
        );
        Err(Error::new(ErrorKind::Changed, context))
    }

    /// Says goodbye on every connection, as far as that goes without waiting.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        for link in self.links() {
            link.say_goodbye();
        }
    }
}

async fn reconnect(pool: Weak<Pool>, index: usize) {
    let begin = Instant::now();
    let mut pause = PAUSE_MIN;
    loop {
        let Some(this) = pool.upgrade() else { return };
        let result = this.attempt().await;
        if this.closed.load(Ordering::Relaxed) {
            result.iter().for_each(|link| link.say_goodbye());
            return;
        }
        let late = begin.elapsed() + pause > this.options.reconnect_limit;
        let is_final = |error: &Error| late || error.kind() == ErrorKind::Changed;
        match result {
            Err(error) if !is_final(&error) => tracing::debug!(%error, "not connected yet"),
            result => {
                let mut member = lock(&this.members[index]);
                member.connecting = false;
                match result {
                    Ok(link) => member.link = Some(link),
                    Err(error) => {
                        tracing::warn!(%error, "the connection is given up");
                        if error.kind() == ErrorKind::Changed {
                            this.changed.get_or_init(|| error.clone());
                        }
                        member.failure = Some(error);
                    }
                }
                drop(member);
                this.news.notify_waiters();
                return;
            }
        }
        drop(this);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn negotiate(uri: &Uri, options: &ClientOptions) -> Result<Negotiated, ConnectError> {
    let negotiated = async { Handshake::begin(uri, options).await?.enter().await };
    let negotiated = tokio::time::timeout(options.connect_timeout, negotiated).await;
    negotiated.map_err(|_| ConnectError::TimedOut { uri: uri.to_string() })?
}

/// Whether requests that fit the one fit the other.
fn is_same(one: &ExportInfo, other: &ExportInfo) -> bool {
    let other = ExportInfo { name: one.name.clone(), description: one.description.clone(), ..other.clone() };
    *one == other
}

fn start(negotiated: Negotiated, epoch: u64, options: &ClientOptions, handle: &Handle) -> Arc<Link> {
    let Negotiated { transport, style, contexts, .. } = negotiated;
    let link = Arc::new(Link::new(style, contexts, epoch, transport.into_halves()));
    let tick = (options.request_timeout / 8).clamp(TICK_MIN, TICK_MAX);
    let ticks = |time: Duration| u32::try_from(time.as_nanos().div_ceil(tick.as_nanos())).unwrap_or(u32::MAX);
    let limits = (ticks(options.request_timeout), ticks(options.slow_timeout));
    handle.spawn(watch(Arc::downgrade(&link), link.clock.clone(), tick, limits));
    link
}

/// Counts the time of a connection's requests while there are any.
async fn watch(link: Weak<Link>, clock: Arc<Notify>, tick: Duration, (limit, slow_limit): (u32, u32)) {
    loop {
        match link.upgrade().map(|link| link.tick(limit, slow_limit)) {
            None => return,
            Some(true) => tokio::time::sleep(tick).await,
            Some(false) => clock.notified().await,
        }
    }
}

impl Trouble {
    /// The error that the caller sees.
    pub(super) fn error(&self, context: String) -> Error {
        match self {
            Trouble::Failed(failure) => failure.error(context),
            Trouble::Down(error) => {
                Error::with_source(error.kind(), format!("{context}: {error}"), error.clone())
            }
        }
    }
}
