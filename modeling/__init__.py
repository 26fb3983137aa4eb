"""What both services need of models: family maps, sharded reader, parallel linears, DFlash config, fuser."""
