//! CloudStack's database over a connection: its rows read, and changed as a merge changed the files.
//!
//! Owns: the connection, one transaction a merge, and the choice between it and an export ([`Source`]). Does not own: what the rows mean
//! ([`cloudstack::records`](crate::cloudstack::records)) or what becomes of them
//! ([`cloudstack::row_change`](crate::cloudstack::row_change)).
//!
//! MySQL 8 and MariaDB. All calls block, each at most [`PATIENCE`]; the connection is used by one caller at a
//! time. Values travel as text, as in an export, so that both are read by the same parser. No message has
//! the URL's password.

mod error;
mod source;

use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Executor as _, Row as _};

use crate::cloudstack::records::{COLUMNS, Records, Row};
use crate::cloudstack::row_change::{Planned, RowChange};
pub use error::{DatabaseError, Result};
pub use source::{RowsError, Source, read_export};

/// How long one call may take.
pub const PATIENCE: Duration = Duration::from_mins(2);
/// The one SELECT, which is the export's.
const SELECT: &str = include_str!("../../scripts/export-records.sql");
/// Its condition, to which others are added.
const CONDITION: &str = "WHERE ref.store_role = 'Image'";

/// What became of the rows of one merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// They say what they should; some may have said so before.
    Done,
    /// Somebody changed one since: none was changed.
    Changed(String),
}

/// A connection.
pub struct Database {
    runtime: tokio::runtime::Runtime,
    connection: Mutex<MySqlConnection>,
}

impl Database {
    /// Connects: `mysql://USER:PASSWORD@HOST:PORT/DATABASE`, with `?socket=PATH` for a socket.
    pub fn connect(url: &str) -> Result<Self> {
        let bad = |detail: String| DatabaseError::Url { detail };
        if !["mysql://", "mariadb://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err(bad("it does not begin with mysql://".to_owned()));
        }
        // The parser's own message may repeat parts of the URL.
        let options: MySqlConnectOptions =
            url.parse().map_err(|_| bad("it is not USER:PASSWORD@HOST:PORT/DATABASE".to_owned()))?;
        let options = options.disable_statement_logging();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| DatabaseError::Runtime { source })?;
        let connection = wait(&runtime, "connect to", MySqlConnection::connect_with(&options))?;
        Ok(Self { runtime, connection: Mutex::new(connection) })
    }

    /// All rows of snapshots on image stores, as of one moment.
    pub fn records(&self) -> Result<Records> {
        self.select(SELECT.to_owned())
    }

    /// The rows of these snapshots and of those that name one of them as parent, as of one moment.
    pub fn records_around(&self, snapshots: &[u64]) -> Result<Records> {
        self.select(around(snapshots))
    }

    fn select(&self, text: String) -> Result<Records> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = sqlx::raw_sql(AssertSqlSafe(text)).fetch_all(&mut *connection);
        let rows = wait(&self.runtime, "read", rows)?;
        parse(&rows)
    }

    /// Makes all changes of one merge in one transaction, if each row still reads as planned or says already what
    /// it should; else none.
    ///
    /// # After a crash
    ///
    /// All or nothing; calling again does the rest.
    pub fn apply(&self, changes: &[RowChange]) -> Result<Applied> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        wait(&self.runtime, "change", apply(&mut connection, changes))?
    }
}

/// The SELECT of some snapshots and their children.
fn around(snapshots: &[u64]) -> String {
    let ids: Vec<String> = snapshots.iter().map(ToString::to_string).collect();
    let ids = if ids.is_empty() { "0".to_owned() } else { ids.join(", ") };
    let condition =
        format!("{CONDITION} AND (ref.snapshot_id IN ({ids}) OR ref.parent_snapshot_id IN ({ids}))");
    SELECT.replace(CONDITION, &condition)
}

fn parse(rows: &[MySqlRow]) -> Result<Records> {
    let columns: Vec<Option<usize>> = COLUMNS
        .iter()
        .map(|name| {
            let row = rows.first()?;
            (0..row.len()).find(|at| sqlx::Column::name(row.column(*at)) == *name)
        })
        .collect();
    let value = |row: &MySqlRow, column: &Option<usize>| {
        let Some(at) = column else { return Ok(None) };
        row.try_get_unchecked::<Option<String>, usize>(*at)
    };
    let values = rows.iter().map(|row| columns.iter().map(|column| value(row, column)).collect());
    let values: Vec<Vec<Option<String>>> = values
        .collect::<std::result::Result<_, sqlx::Error>>()
        .map_err(|source| DatabaseError::Server { action: "read", source })?;
    Records::of_values(values.into_iter()).map_err(|source| DatabaseError::Records { source })
}

async fn apply(
    connection: &mut MySqlConnection,
    changes: &[RowChange],
) -> std::result::Result<Result<Applied>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let ids: Vec<u64> = changes.iter().map(|change| change.planned.snapshot_id).collect();
    let locking = around(&ids).trim_end().trim_end_matches(';').to_owned() + " FOR UPDATE";
    let rows = transaction.fetch_all(sqlx::raw_sql(AssertSqlSafe(locking))).await?;
    let now = match parse(&rows) {
        Ok(records) => records,
        Err(error) => return Ok(Err(error)),
    };
    for change in changes {
        let Some((found, row)) = find(&now, change) else {
            transaction.rollback().await?;
            return Ok(Ok(Applied::Changed(told(change, "is gone"))));
        };
        if change.is_done(&found, row.physical_bytes) {
            continue;
        }
        if found != change.planned {
            transaction.rollback().await?;
            return Ok(Ok(Applied::Changed(told(change, "was changed since it was planned"))));
        }
        let done = transaction.execute(sqlx::raw_sql(AssertSqlSafe(change.statement()))).await?;
        if done.rows_affected() != 1 {
            transaction.rollback().await?;
            return Ok(Ok(Applied::Changed(told(change, "cannot be told from another"))));
        }
    }
    transaction.commit().await?;
    Ok(Ok(Applied::Done))
}

fn find<'a>(records: &'a Records, change: &RowChange) -> Option<(Planned, &'a Row)> {
    let same = |found: &Planned| {
        found.snapshot_id == change.planned.snapshot_id && found.store_uuid == change.planned.store_uuid
    };
    records.rows().iter().find_map(|row| Some((Planned::of(row).filter(same)?, row)))
}

fn told(change: &RowChange, what: &str) -> String {
    let Planned { snapshot_id, store_uuid, .. } = &change.planned;
    format!("the row of snapshot {snapshot_id} on store {store_uuid} {what}")
}

/// Runs one exchange with the server.
fn wait<T>(
    runtime: &tokio::runtime::Runtime,
    action: &'static str,
    work: impl Future<Output = std::result::Result<T, sqlx::Error>>,
) -> Result<T> {
    let done = runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await });
    let done = done.map_err(|_| DatabaseError::Slow { action, patience: PATIENCE })?;
    done.map_err(|source| DatabaseError::Server { action, source })
}
