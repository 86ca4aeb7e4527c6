-- usage: mysql --batch --default-character-set=utf8mb4 --user=USER --password --host=HOST cloud < export-records.sql > records.tsv
--
-- Exports what CloudStack (4.21 or later) knows of the snapshots on its image stores, for `qchain ... --records records.tsv`.
-- Run it with --batch and without --raw or --skip-column-names: qchain reads the column names, and tabs and line ends within a
-- name must arrive escaped. A user with SELECT on snapshots, snapshot_store_ref and image_store suffices. Nothing is changed.
-- It is one SELECT, so it shows one moment: make it shortly before each use, an old one does not know younger children.
--
-- Rows are kept rather than dropped:
-- - snapshots that CloudStack has removed, since a Hidden file with living children belongs to a Destroyed snapshot,
-- - stores that it has removed, and rows of all hypervisors, so that no child goes unseen.
-- Left out is what lies on primary storage (role Primary) and in staging caches (ImageCache).

SELECT
    store.uuid AS store_uuid,
    -- SMB URLs carry user and password after the question mark: not for a file.
    SUBSTRING_INDEX(store.url, '?', 1) AS store_url,
    ref.store_role AS store_role,
    snapshot.id AS snapshot_id,
    -- As the API shows it. The file has another name.
    snapshot.uuid AS snapshot_uuid,
    snapshot.name AS snapshot_name,
    snapshot.account_id AS account_id,
    snapshot.volume_id AS volume_id,
    snapshot.hypervisor_type AS hypervisor_type,
    snapshot.status AS snapshot_status,
    ref.state AS ref_state,
    ref.install_path AS install_path,
    ref.parent_snapshot_id AS parent_snapshot_id,
    -- NULL in rows that are older than the column.
    COALESCE(ref.end_of_chain, 0) AS end_of_chain,
    ref.size AS size,
    ref.physical_size AS physical_size,
    ref.kvm_checkpoint_path AS kvm_checkpoint_path,
    -- As CloudStack stores all its times: UTC.
    ref.created AS created
FROM snapshot_store_ref AS ref
INNER JOIN snapshots AS snapshot ON snapshot.id = ref.snapshot_id
INNER JOIN image_store AS store ON store.id = ref.store_id
WHERE ref.store_role = 'Image'
ORDER BY store.id, snapshot.volume_id, snapshot.id, ref.id;
