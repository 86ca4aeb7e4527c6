-- usage: mysql --batch --default-character-set=utf8mb4 --user=USER --password --host=HOST cloud < export-primary-records.sql > records.tsv
--
-- As export-records.sql, of the KVM snapshots that lie on primary storage: for `qchain audit --records records.tsv` of stores with
-- layout = "primary". A user with SELECT on snapshots, snapshot_store_ref and storage_pool suffices. Nothing is changed.

SELECT
    store.uuid AS store_uuid,
    IF(store.pool_type = 'NetworkFilesystem', CONCAT('nfs://', store.host_address, store.path), NULL) AS store_url,
    ref.store_role AS store_role,
    snapshot.id AS snapshot_id,
    snapshot.uuid AS snapshot_uuid,
    snapshot.name AS snapshot_name,
    snapshot.account_id AS account_id,
    snapshot.volume_id AS volume_id,
    snapshot.hypervisor_type AS hypervisor_type,
    snapshot.status AS snapshot_status,
    ref.state AS ref_state,
    -- /mnt/<pool's uuid>/snapshots/<file>
    ref.install_path AS install_path,
    ref.parent_snapshot_id AS parent_snapshot_id,
    COALESCE(ref.end_of_chain, 0) AS end_of_chain,
    ref.size AS size,
    ref.physical_size AS physical_size,
    ref.kvm_checkpoint_path AS kvm_checkpoint_path,
    ref.created AS created
FROM snapshot_store_ref AS ref
INNER JOIN snapshots AS snapshot ON snapshot.id = ref.snapshot_id
INNER JOIN storage_pool AS store ON store.id = ref.store_id
WHERE ref.store_role = 'Primary'
ORDER BY store.id, snapshot.volume_id, snapshot.id, ref.id;
