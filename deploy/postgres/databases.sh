#!/bin/sh
# A database and a role for each of those who share the server; run once by the image, when its volume is empty. Roles own their database and see no other.
set -eu

make_database() { # name (of role and database), password
    psql --set ON_ERROR_STOP=1 --quiet --username "$POSTGRES_USER" --dbname postgres --set name="$1" --set password="$2" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
}

make_database shop "$SHOP_DB_PASSWORD"
make_database mlflow "$MLFLOW_DB_PASSWORD"
make_database optuna "$OPTUNA_DB_PASSWORD"
psql --set ON_ERROR_STOP=1 --quiet --username "$POSTGRES_USER" --dbname shop --command 'SET ROLE shop' --file /schema/postgres_schema.sql
