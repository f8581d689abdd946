//! What the head of an answer means: pure, so that every wrong answer can be tried without a server.

use reqwest::StatusCode;
use reqwest::header::{
    ACCEPT_RANGES, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName,
    LAST_MODIFIED, RETRY_AFTER,
};
use std::time::Duration;

use crate::{Error, Pin, SourceUrl};

/// The longest validator that is pinned.
const VALIDATOR_BYTES_MAX: usize = 1024;

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// Trying again would not help.
    Final(Error),
    /// It might.
    Passing {
        /// What happened.
        why: String,
        /// Nothing came in time.
        timed_out: bool,
        /// The server says how long to wait.
        after: Option<Duration>,
    },
}

impl Failure {
    pub(super) fn passing(why: impl Into<String>) -> Failure {
        Failure::Passing { why: why.into(), timed_out: false, after: None }
    }

    pub(super) fn timed_out(why: impl Into<String>) -> Failure {
        Failure::Passing { why: why.into(), timed_out: true, after: None }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// No `Range`.
    Whole,
    /// `Range: bytes=start-(end-1)`, never empty.
    Range {
        /// First byte.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
}

/// What is known of the object beforehand.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub(super) length: Option<u64>,
    pub(super) etag: Option<String>,
    pub(super) last_modified: Option<String>,
}

impl From<Pin> for Known {
    fn from(pin: Pin) -> Known {
        Known { length: Some(pin.length), etag: pin.etag, last_modified: pin.last_modified }
    }
}

/// A body that can be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Where in the object the body begins.
    pub(super) start: u64,
    /// Where it ends, if the head says so.
    pub(super) end: Option<u64>,
    /// The object's length, if the head says so.
    pub(super) total: Option<u64>,
    pub(super) etag: Option<String>,
    pub(super) last_modified: Option<String>,
    /// The server says that it knows ranges, or showed it.
    pub(super) ranges: bool,
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

fn validator(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let value =
        text(headers, name).filter(|value| !value.is_empty() && value.len() <= VALIDATOR_BYTES_MAX)?;
    // A weak tag names the same bytes as the strong one wherever byte ranges are served.
    Some(value.strip_prefix("W/").unwrap_or(value).to_owned())
}

/// A `Content-Range`: `bytes 0-499/1234`, `bytes 0-499/*`, `bytes */1234`.
#[derive(Debug, Clone, Copy)]
struct ContentRange {
    /// First byte, and behind the last.
    range: Option<(u64, u64)>,
    total: Option<u64>,
}

fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let value = text(headers, &CONTENT_RANGE)?;
    let (unit, value) = value.split_once(' ')?;
    let (range, total) = value.trim().split_once('/')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    if range == "*" {
        return Some(ContentRange { range: None, total });
    }
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let end = last.checked_add(1).filter(|end| *end > first && total.is_none_or(|total| *end <= total))?;
    Some(ContentRange { range: Some((first, end)), total })
}

/// Judges a head that is no redirect.
pub(super) fn judge(
    url: &SourceUrl,
    status: StatusCode,
    headers: &HeaderMap,
    asked: Asked,
    known: &Known,
) -> Result<Answer, Failure> {
    let name = || url.shown();
    let malformed = |why: &str| Failure::Final(Error::Malformed { url: name(), why: why.to_owned() });
    let mut answer = Answer {
        start: 0,
        end: None,
        total: None,
        etag: validator(headers, &ETAG),
        last_modified: validator(headers, &LAST_MODIFIED),
        ranges: text(headers, &ACCEPT_RANGES).is_some_and(|value| value.eq_ignore_ascii_case("bytes")),
    };
    match status.as_u16() {
        200 => {
            answer.end = text(headers, &CONTENT_LENGTH).and_then(|length| length.parse().ok());
            answer.total = answer.end;
        }
        206 => {
            let Asked::Range { start, end } = asked else {
                return Err(malformed("206 where no range was asked for"));
            };
            let Some(ContentRange { range: Some((from, to)), total }) = content_range(headers) else {
                return Err(malformed("206 without a Content-Range that can be understood"));
            };
            // Fewer bytes are allowed: the rest is asked for again.
            if from != start || to > end {
                let why = format!("bytes {start}..{end} were asked for, {from}..{to} came");
                return Err(malformed(&why));
            }
            (answer.start, answer.end, answer.total, answer.ranges) = (from, Some(to), total, true);
        }
        416 => {
            let total = content_range(headers).and_then(|range| range.total);
            if known.length.is_none() && total == Some(0) {
                (answer.end, answer.total) = (Some(0), Some(0));
                return Ok(answer);
            }
            if let (Some(known), Some(total)) = (known.length, total)
                && known != total
            {
                return Err(length_changed(url, known, total));
            }
            return Err(malformed("the server does not give this range of the object (status 416)"));
        }
        401 | 403 | 407 => {
            return Err(Failure::Final(Error::Denied { url: name(), status: status.as_u16() }));
        }
        404 | 410 => return Err(Failure::Final(Error::NotFound { url: name() })),
        408 | 425 | 429 | 500..=599 => {
            let after =
                text(headers, &RETRY_AFTER).and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
            let why = format!("status {}", status.as_u16());
            return Err(Failure::Passing { why, timed_out: false, after });
        }
        status => return Err(Failure::Final(Error::Status { url: name(), status })),
    }
    if text(headers, &CONTENT_ENCODING).is_some_and(|coding| !coding.eq_ignore_ascii_case("identity")) {
        return Err(malformed(
            "the server encodes the body (Content-Encoding), though only plain bytes are accepted",
        ));
    }
    same_version(url, &answer, known)?;
    Ok(answer)
}

fn length_changed(url: &SourceUrl, known: u64, found: u64) -> Failure {
    let what = format!("it was {known} bytes long, it is now {found}");
    Failure::Final(Error::Changed { url: url.shown(), what })
}

fn same_version(url: &SourceUrl, answer: &Answer, known: &Known) -> Result<(), Failure> {
    if let (Some(known), Some(found)) = (known.length, answer.total)
        && known != found
    {
        return Err(length_changed(url, known, found));
    }
    let changed = |what: &str, was: &str, is: &str| {
        Err(Failure::Final(Error::Changed {
            url: url.shown(),
            what: format!("{what} was {was}, it is now {is}"),
        }))
    };
    match (&known.etag, &answer.etag) {
        (Some(was), Some(is)) if was != is => return changed("its ETag", was, is),
        // Machines behind one address agree on tags more often than on times.
        (Some(_), Some(_)) => return Ok(()),
        _ => {}
    }
    match (&known.last_modified, &answer.last_modified) {
        (Some(was), Some(is)) if was != is => changed("its time of modification", was, is),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url() -> SourceUrl {
        "http://h/x".parse().unwrap()
    }

    fn head(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    fn known() -> Known {
        Known { length: Some(1000), etag: Some("\"a\"".into()), last_modified: Some("then".into()) }
    }

    const ASKED: Asked = Asked::Range { start: 100, end: 200 };

    fn judged(
        status: u16,
        pairs: &[(HeaderName, &str)],
        asked: Asked,
        known: &Known,
    ) -> Result<Answer, Failure> {
        judge(&url(), StatusCode::from_u16(status).unwrap(), &head(pairs), asked, known)
    }

    #[test]
    fn good_answers() {
        let answer =
            judged(206, &[(CONTENT_RANGE, "bytes 100-199/1000"), (ETAG, "W/\"a\"")], ASKED, &known())
                .unwrap();
        assert_eq!((answer.start, answer.end, answer.total), (100, Some(200), Some(1000)));
        assert_eq!(answer.etag.as_deref(), Some("\"a\""));
        assert!(answer.ranges);
        let short = judged(206, &[(CONTENT_RANGE, "bytes 100-149/*")], ASKED, &known()).unwrap();
        assert_eq!((short.end, short.total), (Some(150), None));
        let whole = judged(200, &[(CONTENT_LENGTH, "1000")], ASKED, &known()).unwrap();
        assert_eq!((whole.start, whole.end), (0, Some(1000)));
        assert_eq!(
            judged(416, &[(CONTENT_RANGE, "bytes */0")], ASKED, &Known::default()).unwrap().total,
            Some(0)
        );
        // The tag decides where there is one.
        assert!(judged(200, &[(ETAG, "\"a\""), (LAST_MODIFIED, "now")], Asked::Whole, &known()).is_ok());
    }

    #[test]
    fn wrong_ranges_are_malformed() {
        for range in [
            "bytes 0-99/1000",
            "bytes 101-199/1000",
            "bytes 100-200/1000",
            "bytes 199-100/1000",
            "bytes */1000",
            "bytes 100-199/150",
            "bytes 100-18446744073709551615/*",
            "lines 100-199/1000",
            "bytes=100-199/1000",
            "bytes -100-199/1000",
            "",
            "bytes 100-199",
        ] {
            let judged = judged(206, &[(CONTENT_RANGE, range)], ASKED, &known());
            assert!(matches!(judged, Err(Failure::Final(Error::Malformed { .. }))), "{range}: {judged:?}");
        }
        for (status, pairs) in [(206, vec![]), (416, vec![(CONTENT_RANGE, "bytes */1000")])] {
            assert!(matches!(
                judged(status, &pairs, ASKED, &known()),
                Err(Failure::Final(Error::Malformed { .. }))
            ));
        }
        let encoded = [(CONTENT_ENCODING, "gzip"), (CONTENT_LENGTH, "1000")];
        assert!(matches!(
            judged(200, &encoded, Asked::Whole, &known()),
            Err(Failure::Final(Error::Malformed { .. }))
        ));
    }

    #[test]
    fn other_versions_are_changes() {
        for (status, pairs) in [
            (206, vec![(CONTENT_RANGE, "bytes 100-199/1001")]),
            (206, vec![(CONTENT_RANGE, "bytes 100-199/1000"), (ETAG, "\"b\"")]),
            (206, vec![(CONTENT_RANGE, "bytes 100-199/1000"), (LAST_MODIFIED, "now")]),
            (200, vec![(CONTENT_LENGTH, "999")]),
            (416, vec![(CONTENT_RANGE, "bytes */50")]),
        ] {
            let judged = judged(status, &pairs, ASKED, &known());
            assert!(matches!(judged, Err(Failure::Final(Error::Changed { .. }))), "{pairs:?}: {judged:?}");
        }
    }

    #[test]
    fn other_statuses() {
        let status = |status| judged(status, &[(RETRY_AFTER, "7")], ASKED, &known()).unwrap_err();
        for passing in [408, 429, 500, 502, 503, 504, 599] {
            let after = Some(Duration::from_secs(7));
            assert!(matches!(status(passing), Failure::Passing { after: a, .. } if a == after), "{passing}");
        }
        assert!(matches!(status(404), Failure::Final(Error::NotFound { .. })));
        assert!(matches!(status(410), Failure::Final(Error::NotFound { .. })));
        assert!(matches!(status(401), Failure::Final(Error::Denied { status: 401, .. })));
        assert!(matches!(status(403), Failure::Final(Error::Denied { status: 403, .. })));
        for other in [204, 304, 400, 405, 418] {
            assert!(matches!(status(other), Failure::Final(Error::Status { .. })), "{other}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_content_range_is_survived(value in "(bytes )?[0-9*/ -]{0,60}") {
            if let Ok(answer) = judged(206, &[(CONTENT_RANGE, value.as_str())], ASKED, &known()) {
                assert_eq!(answer.start, 100);
                assert!((101..=200).contains(&answer.end.unwrap()));
            }
        }
    }
}
