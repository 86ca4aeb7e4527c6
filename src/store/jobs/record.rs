//! One job's record, and how its state changes. Pure.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The version of a record's form.
const SCHEMA: u32 = 1;
/// The largest record, in bytes.
pub(super) const MAX_BYTES: u64 = 1 << 20;
/// The most chains that a record names; a job about more is about all.
const MAX_CHAINS: usize = 1000;
/// The longest kind, or name of who asked for a job, in bytes.
const MAX_WORD: usize = 64;

/// A job's id: 32 lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

impl JobId {
    /// A new one, random.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }

    /// That of a key which its maker chose: the same text always gives the same id, so that an exclusive create of
    /// the record decides which of two requests with one key made the job.
    #[must_use]
    pub fn of_key(maker: &str, key: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("qchain 2026 job of an idempotency key");
        hasher.update(&(maker.len() as u64).to_le_bytes());
        hasher.update(maker.as_bytes());
        hasher.update(key.as_bytes());
        Self(hasher.finalize().to_hex().chars().take(32).collect())
    }

    /// Reads one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (text.len() == 32 && text.bytes().all(hex)).then(|| Self(text.to_owned()))
    }

    /// Its digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for JobId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is no job's id: 32 lower-case hex digits"))
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.0
    }
}

/// What is the case with a job.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It waits for its turn.
    Queued,
    /// Somebody works on it, or did until he died.
    Running,
    /// It did what it was asked.
    Done,
    /// It did not, or not all.
    Failed,
    /// It was stopped on request; what was begun is finished or taken back by recovery.
    Cancelled,
}

impl JobState {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Queued, Self::Running, Self::Done, Self::Failed, Self::Cancelled];

    /// Whether nothing more happens to it.
    #[must_use]
    pub fn is_over(self) -> bool {
        match self {
            Self::Queued | Self::Running => false,
            Self::Done | Self::Failed | Self::Cancelled => true,
        }
    }

    /// The word in records and documents.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Why a job failed: the command line's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobError {
    /// Which kind of failure it is.
    pub kind: String,
    /// The stable reason code; `qchain explain` knows it.
    pub code: String,
    /// What happened, with its causes.
    pub message: String,
    /// The member it is about.
    pub member: Option<String>,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRecord {
    schema: u32,
    /// Its id, as in its file's name.
    pub id: JobId,
    /// Which kind of job it is.
    pub kind: String,
    /// What is asked for, with all members by their full names. Whoever runs it parses it.
    pub request: Value,
    /// The BLAKE3 of the request as it came, where that had a key.
    pub key_of: Option<String>,
    /// The lowest members of the chains that it is about; none if it is about all.
    pub chains: Vec<String>,
    /// The name of the token that asked for it.
    pub made_by: String,
    /// When it was made, nanoseconds since 1970.
    pub made_ns: i64,
    /// What is the case with it.
    pub state: JobState,
    /// How often it was begun and not ended; a stop in good order does not count.
    pub attempts: u32,
    /// Who began it last.
    pub owner: Option<String>,
    /// When it was begun first.
    pub begun_ns: Option<i64>,
    /// When it was over.
    pub ended_ns: Option<i64>,
    /// Why it failed.
    pub error: Option<JobError>,
}

impl JobRecord {
    /// A job that waits.
    #[must_use]
    pub fn new(
        id: JobId,
        kind: &str,
        request: Value,
        chains: Vec<String>,
        made_by: &str,
        made_ns: i64,
    ) -> Self {
        let chains = if chains.len() > MAX_CHAINS { Vec::new() } else { chains };
        Self {
            schema: SCHEMA,
            id,
            kind: kind.to_owned(),
            request,
            key_of: None,
            chains,
            made_by: made_by.to_owned(),
            made_ns,
            state: JobState::Queued,
            attempts: 0,
            owner: None,
            begun_ns: None,
            ended_ns: None,
            error: None,
        }
    }

    /// It is begun, perhaps again.
    pub fn begin(&mut self, owner: &str, now_ns: i64) {
        self.state = JobState::Running;
        self.attempts = self.attempts.saturating_add(1);
        self.owner = Some(owner.to_owned());
        self.begun_ns = self.begun_ns.or(Some(now_ns));
    }

    /// It was stopped in good order, and waits to be continued.
    pub fn put_back(&mut self) {
        self.state = JobState::Queued;
        self.owner = None;
        self.attempts = self.attempts.saturating_sub(1);
    }

    /// It is over.
    pub fn end(&mut self, state: JobState, error: Option<JobError>, now_ns: i64) {
        self.state = state;
        self.error = error;
        self.ended_ns = Some(now_ns);
    }

    /// Reads a record; the error says what is wrong. Whatever the bytes are, it neither panics nor takes more memory
    /// than some times their length.
    pub fn decode(id: &JobId, bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > MAX_BYTES {
            return Err(format!("it is longer than {MAX_BYTES} bytes"));
        }
        let record: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if record.schema != SCHEMA {
            return Err(format!("its form is {}, not {SCHEMA}", record.schema));
        }
        if record.id != *id {
            return Err(format!("it is the record of {}", record.id));
        }
        let long = |word: &str| word.len() > MAX_WORD;
        if long(&record.kind) || long(&record.made_by) || record.chains.len() > MAX_CHAINS {
            return Err("a part of it is too long".to_owned());
        }
        Ok(record)
    }

    /// The record as it is written; the error says why it cannot be read again.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let bytes = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        Self::decode(&self.id, &bytes).map(|_| bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::{JobId, JobRecord, JobState};

    fn record() -> JobRecord {
        let id = JobId::of_key("ops", "a");
        JobRecord::new(id, "delete", json!({"members": ["a"]}), vec!["base".to_owned()], "ops", 5)
    }

    #[test]
    fn a_record_goes_through_its_states_and_is_read_as_written() {
        let mut record = record();
        record.begin("host", 7);
        record.begin("other", 9);
        assert_eq!((record.attempts, record.begun_ns, record.state), (2, Some(7), JobState::Running));
        record.put_back();
        assert_eq!((record.attempts, record.state), (1, JobState::Queued));
        record.end(JobState::Cancelled, None, 11);
        assert!(record.state.is_over());
        let bytes = record.encode().unwrap();
        assert_eq!(JobRecord::decode(&record.id, &bytes), Ok(record));
    }

    #[test]
    fn what_is_no_record_of_that_name_is_refused() {
        let record = record();
        let bytes = record.encode().unwrap();
        assert!(JobRecord::decode(&JobId::random(), &bytes).unwrap_err().contains("is the record of"));
        let text = String::from_utf8(bytes).unwrap();
        for (from, to) in [
            ("\"schema\":1", "\"schema\":2"),
            ("{\"schema\"", "{\"colour\":1,\"schema\""),
            ("\"queued\"", "\"sleeping\""),
            ("\"ops\"", &format!("\"{}\"", "x".repeat(100))),
        ] {
            assert!(text.contains(from));
            assert!(JobRecord::decode(&record.id, text.replacen(from, to, 1).as_bytes()).is_err(), "{to}");
        }
        let long = JobRecord { request: json!("x".repeat(2 << 20)), ..record };
        assert!(long.encode().is_err());
    }

    #[test]
    fn a_key_is_of_its_maker() {
        assert_eq!(JobId::of_key("a", "b"), JobId::of_key("a", "b"));
        assert_ne!(JobId::of_key("a", "bc"), JobId::of_key("ab", "c"));
        assert!(JobId::parse(JobId::of_key("a", "b").as_str()).is_some());
        assert!(JobId::parse("../../etc/passwd").is_none());
    }

    proptest! {
        /// Bytes of anybody's: no panic; what is read is written as the same.
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, at in 0_usize..200, with: u8) {
            let id = record().id;
            let _ = JobRecord::decode(&id, &bytes);
            let mut text = record().encode().unwrap();
            let at = at % text.len();
            text[at] = with;
            if let Ok(read) = JobRecord::decode(&id, &text) {
                prop_assert_eq!(JobRecord::decode(&id, &read.encode().unwrap()), Ok(read));
            }
        }
    }
}
