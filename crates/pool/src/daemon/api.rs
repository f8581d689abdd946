//! The daemon's control interface: HTTP and JSON on a Unix socket that only root can open. Each handler names one
//! operation of [`Pool`]; blocking ones run on the blocking pool, long ones answer with a stream of lines.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, response};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{Pool, lock_of, metrics};
use crate::error::{Error, Result};
use crate::indexes::Watch;
use crate::protocol::{
    AddRangeRequest, AddRequest, CreateRequest, EvictRequest, Failure, JobLine, PinRequest, Progress,
};

/// Progress is told at most this often, so that a slow client has few lines waiting.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// All routes.
pub(super) fn router(pool: Arc<Pool>) -> Router {
    Router::new()
        .route("/ready", get(|| async { Json(true) }))
        .route("/status", get(status))
        .route("/metrics", get(metrics_text))
        .route("/list", get(list))
        .route("/images", post(add))
        .route("/containers", post(create))
        .route("/names/{name}", get(show).delete(remove))
        .route("/trace/{name}", get(trace))
        .route("/pin", post(pin))
        .route("/evict", post(evict))
        .route("/ranges", get(ranges).post(add_range))
        .route("/check", post(check))
        .route("/down", post(down))
        .with_state(pool)
}

/// An error as an answer: 4xx when the request was wrong, 5xx when the work failed.
struct Refusal(Error);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match &self.0 {
            Error::NotFound { .. } => StatusCode::NOT_FOUND,
            Error::Exists { .. } | Error::InUse { .. } | Error::Busy { .. } => StatusCode::CONFLICT,
            Error::Invalid { .. } => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(failure(&self.0))).into_response()
    }
}

fn failure(error: &Error) -> Failure {
    Failure { error: error.chain(), hint: error.hint() }
}

type Answer<T> = std::result::Result<Json<T>, Refusal>;

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(
    pool: Arc<Pool>,
    work: impl FnOnce(&Pool) -> Result<T> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(move || work(&pool)).await {
        Ok(result) => result.map(Json).map_err(Refusal),
        Err(panic) => Err(Refusal(Error::step("the request", panic))),
    }
}

async fn status(State(pool): State<Arc<Pool>>) -> Answer<crate::protocol::Status> {
    blocking(pool, Pool::status).await
}

async fn list(State(pool): State<Arc<Pool>>) -> Answer<crate::protocol::Listing> {
    blocking(pool, Pool::list).await
}

async fn metrics_text(State(pool): State<Arc<Pool>>) -> std::result::Result<Response, Refusal> {
    let Json(status) = blocking(pool, Pool::status).await?;
    let text = metrics::text(&status).map_err(|error| Refusal(Error::step("metrics", error)))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([("content-type", kind)], text).into_response())
}

async fn create(
    State(pool): State<Arc<Pool>>,
    Json(request): Json<CreateRequest>,
) -> Answer<crate::protocol::ContainerStatus> {
    blocking(pool, move |pool| pool.create_container(&request)).await
}

async fn show(State(pool): State<Arc<Pool>>, Path(name): Path<String>) -> Answer<crate::protocol::Shown> {
    blocking(pool, move |pool| pool.show(&name)).await
}

async fn trace(State(pool): State<Arc<Pool>>, Path(name): Path<String>) -> Answer<crate::protocol::Trace> {
    blocking(pool, move |pool| pool.trace(&name)).await
}

async fn remove(State(pool): State<Arc<Pool>>, Path(name): Path<String>) -> Answer<()> {
    pool.remove(name).await.map(Json).map_err(Refusal)
}

async fn evict(
    State(pool): State<Arc<Pool>>,
    Json(request): Json<EvictRequest>,
) -> Answer<crate::protocol::Evicted> {
    pool.evict(request.keep_bytes).await.map(Json).map_err(Refusal)
}

async fn ranges(State(pool): State<Arc<Pool>>) -> Answer<crate::protocol::Ranges> {
    blocking(pool, Pool::ranges).await
}

async fn add_range(
    State(pool): State<Arc<Pool>>,
    Json(request): Json<AddRangeRequest>,
) -> Answer<crate::protocol::RangeStatus> {
    pool.add_range(&request).await.map(Json).map_err(Refusal)
}

async fn check(
    State(pool): State<Arc<Pool>>,
    Json(read_data): Json<bool>,
) -> Answer<crate::protocol::Checked> {
    pool.check(read_data).await.map(Json).map_err(Refusal)
}

async fn down(State(pool): State<Arc<Pool>>) -> Answer<()> {
    let answer = blocking(pool.clone(), |pool| pool.unmount()).await?;
    pool.stop();
    Ok(answer)
}

async fn add(State(pool): State<Arc<Pool>>, Json(request): Json<AddRequest>) -> Response {
    job(move |report| async move { pool.add_image(&request, report).await })
}

async fn pin(State(pool): State<Arc<Pool>>, Json(request): Json<PinRequest>) -> Response {
    job(move |report| async move { pool.pin(&request, report).await })
}

/// The client of a long request. When it has gone, the work is cancelled and undoes what it began.
struct Report {
    lines: mpsc::UnboundedSender<Vec<u8>>,
    last: Mutex<Instant>,
}

impl Watch for Report {
    fn progress(&self, step: &str, done: u64, total: u64, unit: &str) {
        let mut last = lock_of(&self.last);
        if last.elapsed() >= PROGRESS_INTERVAL {
            *last = Instant::now();
            let progress = Progress { step: step.to_owned(), done, total, unit: unit.to_owned() };
            let _ = self.lines.send(line::<()>(&JobLine::Progress(progress)));
        }
    }

    fn note(&self, note: String) {
        let _ = self.lines.send(line::<()>(&JobLine::Note(note)));
    }

    fn cancelled(&self) -> bool {
        self.lines.is_closed()
    }
}

fn line<T: Serialize>(line: &JobLine<T>) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(line).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Runs long work as a task of its own, so that it can undo what it began when the client goes away.
fn job<T, F>(work: impl FnOnce(Arc<dyn Watch>) -> F + Send + 'static) -> Response
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let (lines, receiver) = mpsc::unbounded_channel();
    let report = Arc::new(Report { lines: lines.clone(), last: Mutex::new(Instant::now()) });
    tokio::spawn(async move {
        let last = match work(report).await {
            Ok(result) => line(&JobLine::Done(result)),
            Err(error) => line::<()>(&JobLine::Failed(failure(&error))),
        };
        let _ = lines.send(last);
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        let bytes = receiver.recv().await?;
        Some((std::result::Result::<_, std::convert::Infallible>::Ok(bytes), receiver))
    });
    response::Response::new(Body::from_stream(stream))
}
